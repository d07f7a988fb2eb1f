"""`python -m rdlm.runtime`: join the other processes, if there are any, and print versions and devices."""

from __future__ import annotations

import dataclasses

from rdlm.config import InputError
from rdlm.runtime import EXIT_DONE, parse_arguments, run_command, start, versions


@dataclasses.dataclass(frozen=True)
class Check:
    """Join the other processes, if any, and print versions and devices."""

    devices: int = 0
    """Fail unless there are this many devices in all; 0: any number."""
    processes: int = 0
    """Fail unless there are this many processes; 0: any number."""


def main() -> int:
    """`python -m rdlm.runtime`."""
    expected = parse_arguments(Check, prog="python -m rdlm.runtime", description=Check.__doc__)
    start()
    import jax

    for package, version in versions().items():
        print(f"{package:20} {version}")
    for name, found in (("devices", jax.device_count()), ("processes", jax.process_count())):
        wanted = getattr(expected, name)
        if wanted and found != wanted:
            raise InputError(f"JAX sees {found} {name}, not {wanted}")
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
