"""Reading config.json: the file, and one field of a given type."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rdlm.config import InputError

Json = Any
"""A value of config.json."""
Fields = dict[str, Json]

LARGEST = {int: 2**31 - 1, float: 1e30, str: math.inf, bool: math.inf}
"""Of numbers, by type of field: what an int32 holds, and what is finite in float32."""


def read_fields(folder: Path) -> Fields:
    """The JSON object in folder/config.json.

    Raises:
      InputError: no folder, no file, or not a JSON object.
    """
    path = folder / "config.json"
    if folder.is_file():
        raise InputError(f"{folder}: is a file; give the folder that holds it and config.json")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not path.is_file():
        raise InputError(f"{path}: missing; expected a Hugging Face model folder")
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields


def typed(fields: Fields, name: str, kind: type, default: Json, where: str) -> Json:
    """The value of a field.

    Raises:
      InputError: another type, or a number beyond the `LARGEST` of its type.
    """
    value = fields.get(name, default)
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and not abs(value) <= LARGEST.get(kind, math.inf)
    ):
        raise InputError(f"{where}: {name} = {str(value)[:40]}: must be a number of at most {LARGEST[kind]:g}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{where}: {name} = {value!r}: must be of type {kind.__name__}")
    return value


def whole(number: float) -> float:
    """The number as it is written where the public code writes whole numbers, or takes them, without a point."""
    return int(number) if float(number).is_integer() else number


def named_by(names: Mapping[str, tuple[str, object]], error: InputError, where: str) -> InputError:
    """An error about a field of ModelConfig, as one about the field of config.json behind it.

    names: field of config.json -> (field of ModelConfig, anything).
    """
    message = str(error).removeprefix(f"{where}: ")
    ours = message.partition(" = ")[0]
    theirs = next((name for name, (found, _) in names.items() if found == ours), ours)
    return InputError(f"{where}: {theirs}{message[len(ours) :]}")
