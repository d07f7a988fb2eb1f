"""Paths that a user gives: local ones, with ~ expanded."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from rdlm.config.errors import InputError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # `Path` makes gs:/b/x of gs://b/x


def local_path(path: str | os.PathLike[str], field: str = "") -> Path:
    """A path to read or write, of a file or folder on this machine; ~ is expanded.

    Args:
      path: as the user gave it.
      field: where; named in the message.

    Raises:
      InputError: empty, a URL, the home of nobody, or a name that this process cannot encode.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"{field or 'path'} = {path!r}: must be a path")
    text = os.fspath(path)
    if not text:
        raise InputError(f"{field or 'path'} = '': is empty; name a file or folder, the current one as .")
    typed = _URL.sub(lambda scheme: scheme[0] + "/", text, count=1) if isinstance(path, Path) else text
    named = f"{field} = {typed!r}" if field else typed
    if _URL.match(text):
        raise InputError(
            f"{named}: is a URL, and this must be a local path; mount the bucket (gcsfuse, tpu_setup/mount.sh) and "
            "give the folder there"
        )
    place = os.path.expanduser(text)
    if text.startswith("~") and place == text:
        raise InputError(f"{named}: there is no such home folder; write ./{text} for a name that begins with ~")
    if "\0" in text:
        raise InputError(f"{named}: must not contain the NUL character")
    try:
        whole = os.path.abspath(place)
        encodable = os.fsencode(whole).decode() == whole
    except (UnicodeError, OSError):
        encodable = False
    if not encodable:
        raise InputError(
            f"{named}: has a name that is not {sys.getfilesystemencoding()}, or lies below one; set PYTHONUTF8=1, or "
            "rename it"
        )
    if max(len(os.fsencode(name)) for name in whole.split("/")) > 255:
        raise InputError(f"{named[:60]}...: has a name of more than 255 bytes; shorten it")
    return Path(place)


def is_url(path: str) -> bool:
    """Whether a path names something in a bucket or on a server."""
    return _URL.match(path) is not None
