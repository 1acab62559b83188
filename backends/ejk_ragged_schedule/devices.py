"""Facts of a GPU that the sizes of the kernels follow from. Without a device to ask, the facts are those of an H100."""

from ejk_ragged import Target


MULTIPROCESSORS = 132
# What the names of GPUs contain whose memory is fast for their multiprocessors. An H200 has the multiprocessors of an H100, and
# reads 1.43 times as many bytes per second.
FAST_MEMORY = ("H200",)


def multiprocessors(target: Target) -> int:
    return getattr(target.device, "core_count", None) or MULTIPROCESSORS


def has_fast_memory(target: Target) -> bool:
    """Whether a kernel that is as fast as the memory of an H100 would be slower than the memory of this GPU."""
    return any(name in getattr(target.device, "device_kind", "") for name in FAST_MEMORY)
