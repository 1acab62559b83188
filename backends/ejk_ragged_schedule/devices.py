"""Facts of a GPU that the sizes of the kernels follow from. Without a device to ask, the facts are those of an H100."""

from ejk_ragged import Target


MULTIPROCESSORS = 132
# Words in the names of GPUs whose memory is fast for their multiprocessors, by measurement. An H200 has the multiprocessors of an
# H100, and reads 1.43 times as many bytes per second.
FAST_MEMORY = {"H200"}


def multiprocessors(target: Target) -> int:
    return getattr(target.device, "core_count", None) or MULTIPROCESSORS


def has_fast_memory(target: Target) -> bool:
    """Whether a kernel that is as fast as the memory of an H100 would be slower than the memory of this GPU."""
    return not FAST_MEMORY.isdisjoint(getattr(target.device, "device_kind", "").split())
