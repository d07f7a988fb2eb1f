"""Local copies of prepared folders that lie in a bucket."""

from __future__ import annotations

import hashlib
from pathlib import Path

import fsspec

from rdlm.config import InputError, is_url, local_path, one_line
from rdlm.data.manifest import read_manifest
from rdlm.runtime.files import complete_folder


def local_copy(folder: str, cache: str) -> Path:
    """`folder` itself if it is local; for a URL (gs://...) a copy below `cache`, made once and checked.

    array_record reads local files only: mount the bucket to train on more data than fit on the disk of a host.

    Raises:
      InputError: it cannot be copied, or arrives damaged.
    """
    if not is_url(folder):
        return local_path(folder, "data.prepared")
    try:
        fs, root = fsspec.core.url_to_fs(folder)
        manifest = fs.cat_file(f"{root}/manifest.json")
        # Named by its content: another manifest at the same URL is another copy.
        name = f"{root.rstrip('/').rpartition('/')[2]}-{hashlib.sha256(manifest).hexdigest()[:12]}"
        final = local_path(cache) / name
        if not final.exists():
            with complete_folder(final) as partial:
                fs.get(f"{root.rstrip('/')}/", f"{partial}/", recursive=True)
                read_manifest(partial, checksums=True)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{folder}: {error}; for gs:// run: pip install 'rdlm[gcs]'") from error
    except FileNotFoundError as error:
        raise InputError(f"{folder}: not prepared data (no manifest.json there)") from error
    except Exception as error:  # each file system raises its own
        raise InputError(f"{folder}: cannot be copied ({one_line(error)})") from error
    return final
