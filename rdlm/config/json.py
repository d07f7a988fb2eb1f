"""Strict JSON for the config dataclasses: unknown fields and wrong types are errors."""

from __future__ import annotations

import dataclasses
import functools
import json
import numbers
import types
import typing
from collections.abc import Hashable
from typing import Any, TypeVar

from rdlm.config.errors import InputError, did_you_mean, one_line

C = TypeVar("C")


def to_json(config: Any) -> str:
    """The config dataclass as indented JSON text, every field written."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(cls: type[C], text: str, where: str = "config.json") -> C:
    """Read back what `to_json` wrote.

    Raises:
      InputError: malformed JSON, an unknown or missing field, or a value of the wrong type, named with `where`.
    """
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:  # too many digits, too many brackets
        raise InputError(f"{where}: not JSON ({error})") from error
    return _build(cls, tree, where)


def check_types(config: Any, section: str = "") -> None:
    """Refuse a field of a config dataclass whose value does not fit its annotation; `section` precedes its name.

    Raises:
      InputError: naming the field.
    """
    for name, hint in _hints(config.__class__).items():
        value = getattr(config, name)
        if not _fits(hint, value):
            raise InputError(f"{section}{name} = {one_line(repr(value))}: must be {_words(hint)}")


def _words(hint: Any) -> str:
    """What a value of this type is, as in `_fits`."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(options)}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_words, options))
    if origin is tuple:
        return f"a tuple, each element {_words(options[0])}"
    known = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", types.NoneType: "None"}
    return known.get(hint, f"of type {hint.__name__}")


@functools.cache
def _hints(cls: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fits(hint: Any, value: object) -> bool:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return isinstance(value, str) and value in options
    if origin in (types.UnionType, typing.Union):
        return any(_fits(option, value) for option in options)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(options[0], x) for x in value)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return (
            isinstance(value, kind) and not isinstance(value, bool) and -(2**1023) < typing.cast(float, value) < 2**1023
        )
    return isinstance(value, hint)


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields in which two configs of one class differ: {'optimizer.learning_rate': (old, new)}."""
    found: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(old):
        a, b, name = getattr(old, field.name), getattr(new, field.name), prefix + field.name
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            found |= differences(a, b, name + ".")
        elif a != b:
            found[name] = (a, b)
    return found


def _build(cls: Any, tree: Any, where: str) -> Any:
    if not isinstance(tree, dict):
        raise InputError(f"{where}: expected an object with the fields of {cls.__name__}, found {type(tree).__name__}")
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for name in tree:
        if name not in fields:
            raise InputError(f"{where}: unknown field {name!r}.{did_you_mean(name, fields)}")
    values = {}
    for name, field in fields.items():
        if name in tree:
            values[name] = _value(hints[name], tree[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: field {name!r} is missing")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value not in options:
            raise InputError(f"{where} = {value!r}: must be one of {', '.join(map(repr, options))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in options:
            return None
        return _value(next(o for o in options if o is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where} = {value!r}: must be a list")
        return tuple(_value(options[0], v, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023:
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{where} = {value!r}: must be of type {hint.__name__}")
    return value
