"""Installed versions and devices."""

from __future__ import annotations

import importlib.metadata
import platform

from rdlm.runtime.compile_cache import compiled_programs


def versions() -> dict[str, str]:
    """Versions of the packages that rdlm needs, the devices JAX sees, and the folder of compiled programs."""
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
    found["compiled programs"] = compiled_programs()
    return found
