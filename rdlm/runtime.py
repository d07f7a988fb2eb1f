"""Process start and end: versions, devices, exit codes. `python -m rdlm.runtime` prints what is installed."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable

from rdlm.config import InputError

EXIT_DONE, EXIT_WRONG_INPUT, EXIT_PREEMPTED = 0, 2, 75


def run_command(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: 0 done, 75 preempted and saved, 2 wrong input with one line on stderr.

    Anything else is a bug and keeps its traceback.
    """
    try:
        code = main()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(EXIT_WRONG_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away (`| head`): nothing to tell
        sys.exit(141)
    sys.exit(code or EXIT_DONE)


def versions() -> dict[str, str]:
    """Installed versions of what rdlm stands on, and the devices JAX sees."""
    import jax

    packages = (
        "rdlm jax jaxlib libtpu flax optax orbax-checkpoint chex tensorflow-datasets grain array-record tokenizers"
    )
    found = {"python": platform.python_version()}
    for name in packages.split():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    kinds = [device.device_kind for device in jax.devices()]
    found["devices"] = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    found["processes"] = str(jax.process_count())
    return found


if __name__ == "__main__":
    for package, version in versions().items():
        print(f"{package:20} {version}")
