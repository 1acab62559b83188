"""How many kv heads are one wide head, see `ejk_ragged_schedule.joined`."""

from ejk_ragged import Problem, Target
from ejk_ragged_schedule.devices import has_fast_memory
from ejk_ragged_schedule.joined import with_joined_heads
from ejk_ragged_schedule.sizes import most_bytes, most_keys


# How many kv heads are joined, by head dimension, as measured on an H200. Their keys are whole lines of the memory, 5, 3 and 7
# of 128 bytes. FAST_JOINED is for padded caches in fast memory.
JOINED = {80: 4, 96: 2, 112: 4}
FAST_JOINED = JOINED | {64: 2}
# Fewer are joined if they would have more than MOST_ROWS query rows, or tiles of more than MOST_TILE_BYTES, which only hints have.
MOST_ROWS, MOST_TILE_BYTES = 16, 96 * 1024
# None are joined where a token sees at most SHORT rows, or where a full cache has fewer than MUCH bytes, or FAST_MUCH for padded
# caches in fast memory: programs have little to do then.
SHORT, MUCH, FAST_MUCH = 256, 64 << 20, 32 << 20
# An H100 runs the same program with the same multiprocessors. If it takes 1.43 times the time of an H200, which is the ratio of
# their bandwidths, it is still faster than it was with kv heads apart.
CAPABILITY = "9.0"


def joined(problem: Problem, target: Target) -> tuple[Problem, int]:
    """The problem whose kv heads are the joined ones, and how many are one."""
    fast = has_fast_memory(target) and not problem.paged
    table, much = (FAST_JOINED, FAST_MUCH) if fast else (JOINED, MUCH)
    heads = table.get(problem.head_dim, 1) if _pays(problem, target, much) else 1
    rows = problem.num_tokens * problem.group
    tile_bytes = (problem.fwd_params.block_size_keys or 0) * (problem.head_dim + problem.value_dim) * problem.cache_dtype.itemsize
    while heads > 1 and (problem.num_kv_heads % heads or heads * rows > MOST_ROWS or heads * tile_bytes > MOST_TILE_BYTES):
        heads //= 2
    return with_joined_heads(problem, heads), heads


def _pays(problem: Problem, target: Target, much: int) -> bool:
    """Whether joining is faster, if few bytes are less than `much`."""
    # Scales of a quantised cache differ from kv head to kv head. If `num_key_splits` is given, bits must not depend on the batch.
    if (
        problem.value_columns is not None
        or problem.value_dim != problem.head_dim
        or problem.cache_dtype.itemsize != 2
        or problem.fwd_params.num_key_splits
    ):
        return False
    capability = getattr(target.device, "compute_capability", None)
    return capability == CAPABILITY and most_keys(problem) > SHORT and most_bytes(problem) >= much
