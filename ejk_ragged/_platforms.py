"""JAX's names of platforms, and what they are here."""

from typing import Any

import jax


KNOWN_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # what JAX can lower for by these names; others take its default rule


def platform_of(device: Any) -> str:
    """The name by which JAX lowers for `device`; its `platform` says "gpu" for both kinds of GPU."""
    if device.platform == "gpu":
        return "rocm" if "rocm" in getattr(device.client, "platform_version", "") else "cuda"
    return device.platform


def gpu_platform() -> str:
    """What "gpu" means here: JAX says so of NVIDIA's and of AMD's."""
    try:
        return platform_of(jax.local_devices(backend="gpu")[0])
    except RuntimeError:  # there is none
        return "cuda"
