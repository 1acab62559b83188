"""JAX's names of platforms."""

from typing import Any

import jax


KNOWN_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # each gets its own lowering rule; other platforms use the default rule


def platform_of(device: Any) -> str:
    """The name by which JAX lowers for `device`: "cuda" or "rocm" for a GPU, where `device.platform` is only "gpu"."""
    if device.platform == "gpu":
        return "rocm" if "rocm" in getattr(device.client, "platform_version", "") else "cuda"
    return device.platform


def gpu_platform() -> str:
    """The platform that "gpu" stands for on this machine: "rocm" if its GPU is AMD's, otherwise "cuda"."""
    try:
        return platform_of(jax.local_devices(backend="gpu")[0])
    except RuntimeError:  # no GPU
        return "cuda"
