"""One peer of experiments/bench/peers.py, in a process of its own: `python peer_process.py rdlm|transformers THREADS`.

Reads requests from standard input, one JSON object a line, and answers each with one: what the method named by `do`
returns and the `seconds` it took, or an `error`. What libraries print goes to standard error. Needs nothing of rdlm
when it runs the other peer, whose environment does not have it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

THRESHOLD = 5e-4
"""Of the exit rule KL, in adaptive decoding."""
RATE, DECAY = 1e-5, 0.01
"""Learning rate and weight decay of AdamW; everything else is the default of both optimizers, and the same."""

Answer = dict[str, Any]


class Peer(Protocol):
    """What a peer can be asked. Initial states are zeros, so that recurrent-depth models compute the same."""

    def load(self, folder: str, dtype: str, trusted: bool) -> Answer:
        """Read the model, with weights in float32 or bfloat16."""

    def logits(self, tokens: list[int]) -> Answer:
        """Logits [V] behind the last token."""

    def generate(self, tokens: list[int], new_tokens: int, adaptive: bool) -> Answer:
        """Greedy tokens behind a prompt, and with exits the recurrences of each."""

    def train(self, rows: list[list[int]]) -> Answer:
        """One step on rows [B, L + 1]: forward, backward, AdamW. The weights stay in float32."""


class Ours:
    """This project."""

    def __init__(self) -> None:
        import jax

        self.jax = jax
        self.state: list[Any] = []  # parameters and moments, once it has trained

    def load(self, folder: str, dtype: str, trusted: bool) -> Answer:
        """As `Peer.load`."""
        import dataclasses

        import rdlm

        self.rdlm = rdlm
        params, config = rdlm.load_huggingface(folder)
        self.params = rdlm.cast(params, dtype)
        stored: Any = dtype
        self.config = dataclasses.replace(config, param_dtype=stored)
        compute: Any = None if dtype == "float32" else dtype
        self.trained = dataclasses.replace(config, param_dtype="float32", compute_dtype=compute)
        r = config.mean_recurrence
        k = min(config.backprop_depth, r)
        self.steps, self.state = (r - k, k), []
        return {"versions": f"jax {self.jax.__version__}", "vocab": config.vocab_size}

    def _zeros(self, B: int, L: int) -> Any:
        """Initial states, where the model has any of its own."""
        import numpy as np

        config = self.config
        return np.zeros((B, L, config.state_dim), np.float32) if config.loop.start == "noise" else None

    def logits(self, tokens: list[int]) -> Answer:
        """As `Peer.logits`."""
        import numpy as np

        zeros = self._zeros(1, len(tokens))
        forward = self.jax.jit(self.rdlm.forward, static_argnames="config")
        out = forward(self.params, self.config, np.asarray([tokens]), state=zeros)
        return {"logits": out.logits[0, -1].tolist()}

    def generate(self, tokens: list[int], new_tokens: int, adaptive: bool) -> Answer:
        """As `Peer.generate`."""
        exits: dict[str, Any] = {}
        if adaptive:
            exits["exit_rule"] = self.rdlm.exits.kl(THRESHOLD)
            exits |= {"prefill_exit": "together", "cache": self.rdlm.CachePolicy(lookup="skip")}
        out = self.rdlm.generate(self.params, self.config, [tokens], max_new_tokens=new_tokens, init_scale=0.0, **exits)
        return {"tokens": out.tokens[0].tolist(), "steps": out.steps[0].tolist()}

    def train(self, rows: list[list[int]]) -> Answer:
        """As `Peer.train`."""
        import numpy as np

        if not self.state:
            self._begin(np.asarray(rows))
        *self.state, loss = self.step(*self.state, self.jax.device_put(np.asarray(rows), self.by_row))
        return {"loss": float(loss)}

    def _begin(self, rows: Any) -> None:
        """Compile the step, on as many devices as divide the rows."""
        import math

        import numpy as np
        import optax
        from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

        jax, rdlm, config = self.jax, self.rdlm, self.trained
        B, L = rows.shape[0], rows.shape[1] - 1
        devices = jax.devices()[: math.gcd(B, len(jax.devices()))]
        mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
        whole, self.by_row = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
        tx = optax.adamw(RATE, weight_decay=DECAY)
        zeros = jax.device_put(self._zeros(B, L), self.by_row)

        def step(params: Any, moments: Any, rows: Any, zeros: Any) -> Any:
            def loss(params: Any) -> Any:
                return rdlm.loss(params, config, rows, steps=self.steps, state=zeros)

            value, grads = jax.value_and_grad(loss)(params)
            updates, moments = tx.update(grads, moments, params)
            return optax.apply_updates(params, updates), moments, value

        compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=(whole, whole, whole))
        self.step: Any = lambda params, moments, rows: compiled(params, moments, rows, zeros)
        params = jax.device_put(rdlm.cast(self.params, "float32"), whole)
        # Arrays of their own: `cast` returns those that have the dtype, and a step gives its arguments up.
        params = jax.jit(lambda tree: jax.tree.map(lambda x: x + 0, tree), out_shardings=whole)(params)
        self.state = [params, jax.jit(tx.init, out_shardings=whole)(params)]


class Theirs:
    """transformers, or code beside the weights that it loads."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.optimizer: Any = None

    def load(self, folder: str, dtype: str, trusted: bool) -> Answer:
        """As `Peer.load`."""
        import transformers

        self.dtype, self.optimizer = getattr(self.torch, dtype), None
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=self.dtype, trust_remote_code=trusted
        ).eval()
        config = self.model.config
        self.depth = config.mean_recurrence if trusted else 0
        k = min(config.mean_backprop_depth, self.depth) if trusted else 0
        self.zeros = {"init_scale": 0.0} if trusted else {}
        self.inference = {"num_steps": self.depth, **self.zeros} if trusted else {}
        self.training = {"num_steps": (self.depth - k, k), **self.zeros} if trusted else {}
        self.generation = transformers.GenerationConfig
        found = f"torch {self.torch.__version__}, transformers {transformers.__version__}"
        return {"versions": found, "vocab": config.vocab_size}

    def logits(self, tokens: list[int]) -> Answer:
        """As `Peer.logits`."""
        with self.torch.no_grad():
            out = self.model(self.torch.tensor([tokens]), **self.inference)
        return {"logits": out.logits[0, -1].float().tolist()}

    def generate(self, tokens: list[int], new_tokens: int, adaptive: bool) -> Answer:
        """As `Peer.generate`."""
        prompt = self.torch.tensor([tokens])
        # A `max_length` of 20 means none to transformers; the reference's decoding with exits reads nothing else.
        room = {"max_length": len(tokens) + new_tokens} if adaptive else {"max_new_tokens": new_tokens}
        config = self.generation(**room, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
        exits = {"criterion": "kl", "exit_threshold": THRESHOLD} if adaptive else {}
        mask = {} if self.depth else {"attention_mask": self.torch.ones_like(prompt)}
        self.model.generation_config.eos_token_id = None  # a random model may well write one
        with self.torch.no_grad():
            out = self.model.generate(prompt, config, **mask, **self.inference, **exits)
        steps = [int(token[0][0]) or self.depth for token in out.scores] if adaptive else []
        return {"tokens": out.sequences[0, len(tokens) :].tolist(), "steps": steps}

    def train(self, rows: list[list[int]]) -> Answer:
        """As `Peer.train`."""
        torch = self.torch
        if self.optimizer is None:
            self.model = self.model.float().train()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
        all_rows = torch.tensor(rows)
        inputs, labels = all_rows[:, :-1], all_rows[:, 1:]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits = self.model(inputs, use_cache=False, **self.training).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss.item()}


def answer(do: Callable[..., Answer], given: Answer) -> Answer:
    """What `do` returns and how long it took, or the error that it raised."""
    start = time.perf_counter()
    try:
        return do(**given) | {"seconds": time.perf_counter() - start}
    except Exception as error:
        import traceback

        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def begin(name: str, threads: int) -> Peer:
    """The peer, with so many threads."""
    if hasattr(os, "sched_setaffinity"):  # before threads are counted and started
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if name == "transformers":
        import torch

        torch.set_num_threads(threads)
        return Theirs()
    from rdlm.runtime import reuse_freed_memory

    reuse_freed_memory()
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", threads)  # a training step splits its rows over them
    return Ours()


def main(name: str, threads: int) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    peer = begin(name, threads)
    for line in sys.stdin:
        given = json.loads(line)
        do = getattr(peer, given.pop("do"))
        print(json.dumps(answer(do, given)), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
