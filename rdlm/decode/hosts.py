"""One model on several hosts: process 0 says what is done next, and all do it in the same order.

Every process has the same engines. Whatever runs on the devices depends on what process 0 says and on nothing else: no
clock, no listener and no measurement of one host. What comes from outside, requests and who gives them up, is said at
the beginning of a step.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rdlm.config import InputError
from rdlm.decode.requests import Request
from rdlm.runtime import agree
from rdlm.runtime.line import Line


@functools.cache
def hosts() -> Hosts:
    """Those of this process. All processes ask for them together."""
    return Hosts()


class Hosts:
    """What process 0 asks of all processes, itself included."""

    def __init__(self) -> None:
        self._line = Line()
        self._actions: list[weakref.WeakMethod] = []
        self._turn = threading.RLock()
        self._runner: int | None = None  # thread that is running an action
        self._followed = False

    def everywhere(self, action: Callable[..., Any]) -> Callable[..., Any]:
        """`run(message, ...)`, with which process 0 makes a message and all run action(message, ...), the others with
        the message alone.

        All processes name the same methods in the same order. Their objects are not kept alive.
        """
        number, known = len(self._actions), weakref.WeakMethod(action)
        self._actions.append(known)

        def run(message: Callable[[], bytes] = bytes, *here: object) -> Any:
            self.require_outside()
            with self._turn:  # of all engines, as they share the devices
                self.require_first("run it")
                method = known()
                assert method is not None
                self._runner = threading.get_ident()
                try:
                    text = message()
                    self._line.say(number.to_bytes(2, "big") + text)
                    return method(text, *here)
                except BaseException:  # the others may be ahead now
                    self._line.cut()
                    raise
                finally:
                    self._runner = None

        return run

    def require_outside(self) -> None:
        """Refuse a listener that runs an engine. Raises InputError."""
        if self._runner == threading.get_ident():
            raise InputError("Engine: called from on_token; a listener cannot run an engine of the same hosts")

    def require_first(self, what: str) -> None:
        """Refuse what process 0 alone may do. Raises InputError."""
        index, count = self._line.index, self._line.count
        if index:
            raise InputError(f"Engine: this is process {index} of {count}; {what} on process 0, and call follow() here")
        if not self._line.open:
            raise InputError(
                "Engine: was closed, or has failed, and the other hosts follow no more; start all of them again"
            )

    def follow(self) -> None:
        """On the others: do what process 0 asks for, until it closes.

        Raises:
          InputError: this is process 0, or it has followed to the end.
        """
        if not self._line.index:
            raise InputError("Engine: this is process 0, which others follow; submit requests and run the engine")
        if self._followed:
            raise InputError("Engine: process 0 has closed its engines; make new ones on all hosts")
        self._followed = True
        while message := self._line.hear():
            action = self._actions[int.from_bytes(message[:2], "big")]()
            assert action is not None, "process 0 uses an engine that this process has dropped"
            action(message[2:])
        hosts.cache_clear()

    def close(self) -> None:
        """On process 0: let the others stop following."""
        self.require_outside()
        with self._turn:
            if self._line.open and not self._line.index:
                self._line.close()
                hosts.cache_clear()


def require_same(things: dict[str, PyTree]) -> None:
    """Refuse arguments that differ between processes, which all call this together. Raises InputError."""

    def digest(tree: PyTree) -> str:
        text = hashlib.sha256(str(jax.tree.structure(tree)).encode())
        for leaf in map(_plain, jax.tree.leaves(tree)):
            text.update(f"{leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
        return text.hexdigest()[:16]

    agree({name: thing if isinstance(thing, str | int) else digest(thing) for name, thing in things.items()})


class News(NamedTuple):
    """What came from outside since the last step of an engine."""

    came: Sequence[tuple[tuple[int, int], int, np.ndarray, Request]]  # rank, most new tokens, prompt, options
    left: Sequence[int]  # second numbers of the ranks of requests that nobody wants any more

    def packed(self) -> bytes:
        """As a message."""
        rows = [b"".join(_plain(leaf).tobytes() for leaf in jax.tree.leaves(row)) for *_, row in self.came]
        sizes = [[*rank, limit, prompt.size] for rank, limit, prompt, _ in self.came]
        texts = [prompt.tobytes() + row for (_, _, prompt, _), row in zip(self.came, rows, strict=True)]
        return json.dumps([sizes, list(self.left)]).encode() + b"\n" + b"".join(texts)

    @classmethod
    def of(cls, message: bytes, like: Request) -> News:
        """What `packed` gave, for requests whose arrays have the shapes of those of `like`."""
        head, _, rest = message.partition(b"\n")
        sizes, left = json.loads(head)
        structure: jax.tree_util.PyTreeDef
        leaves, structure = jax.tree.flatten(like)
        came = []
        for *rank, limit, size in sizes:
            prompt, rest = np.frombuffer(rest[: 4 * size], np.int32), rest[4 * size :]
            made = []
            for leaf in leaves:
                plain = _plain(leaf)
                data = np.frombuffer(rest[: plain.nbytes], plain.dtype).reshape(plain.shape)
                made.append(jax.random.wrap_key_data(jnp.asarray(data), impl=_impl(leaf)) if _is_key(leaf) else data)
                rest = rest[plain.nbytes :]
            came.append(((rank[0], rank[1]), limit, prompt, structure.unflatten(made)))
        return cls(came, left)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _impl(leaf: Any) -> Any:
    return jax.random.key_impl(leaf)


def _plain(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
