"""The machine of a benchmark: the device, its memory, and the bandwidth of reading and copying the memory."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from ejk_ragged._platforms import platform_of

from .timing import graph_times, kernel_times, wall_times


def default_platform() -> str:
    """The platform of JAX's default device."""
    return platform_of(jax.devices()[0])


@dataclasses.dataclass(frozen=True)
class Machine:
    """The device of a benchmark, and its bandwidths in bytes per second. For copying, read and written bytes both count."""

    platform: str
    device: str
    memory: int
    read: float
    copy: float | None

    @classmethod
    def here(cls, copying: bool = False) -> "Machine":
        device = jax.devices()[0]
        platform = platform_of(device)
        stats = device.memory_stats() or {}
        memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        copy = copy_bandwidth(platform, memory) if copying else None
        return cls(platform, device.device_kind, memory, read_bandwidth(platform, memory), copy)

    @property
    def counts_kernels(self) -> bool:
        return self.platform in ("cuda", "rocm")


def read_bandwidth(platform: str, memory: int) -> float:
    """Bytes per second of reading memory once, in order, on a device with `memory` bytes. The best of several ways."""
    size = _power_of_two(min(memory // 8, 4 << 30 if platform != "cpu" else 256 << 20))
    rows = jax.random.bits(jax.random.key(0), (1 << 15, size >> 17), jnp.uint32)
    largest = jax.jit(lambda x: jnp.max(x, axis=1))
    if platform != "cpu":
        return rows.nbytes / kernel_times(lambda run: largest(rows), 8).time.least
    host = np.asarray(rows).view(np.int32)
    ways = {"xla": lambda run: largest(rows), "numpy": lambda run: host.max()}
    return rows.nbytes / min(timing.seconds for timing in wall_times(ways, 5).values())


def copy_bandwidth(platform: str, memory: int) -> float:
    """Bytes per second of copying memory once, read plus written. The better of XLA's copy and, on a GPU, PyTorch's copy."""
    size = _power_of_two(min(memory // 16, 2 << 30 if platform != "cpu" else 256 << 20))
    source = jax.lax.bitcast_convert_type(jax.random.bits(jax.random.key(0), (size >> 2,), jnp.uint32), jnp.int32)
    inverted = jax.jit(lambda x: ~x)  # XLA might do a plain copy without a kernel
    if platform == "cpu":
        return 2 * size / wall_times({"xla": lambda run: inverted(source)}, 5)["xla"].seconds
    best = kernel_times(lambda run: inverted(source), 8).time.least
    try:
        import torch  # pyright: ignore[reportMissingImports]

        best = min(best, _torch_copy(torch, torch.from_dlpack(source)))
    except Exception:  # PyTorch is not installed, does not see this GPU, or has no memory: XLA's copy counts
        pass
    return 2 * size / best


def _torch_copy(torch, source) -> float:
    target = torch.empty_like(source)
    return graph_times(torch, lambda run: target.copy_(source), 8).time.least


def _power_of_two(n: int) -> int:
    return 1 << (n.bit_length() - 1)
