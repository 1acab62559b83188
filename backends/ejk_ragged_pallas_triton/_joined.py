"""Several kv heads as one wide head, because a copy of few bytes per row is slow. A program then has the query rows of all of them.

The rows of neighbouring kv heads lie side by side in the cache. A query row has zeros in the columns of the other kv heads, and
uses its own columns of the output. The tensor cores multiply 16 query rows at least, so the further query rows cost nothing.
"""

import dataclasses

from ejk_ragged import Cache, Problem, Target
from ejk_ragged_schedule.devices import has_fast_memory


# As measured on an H200. Kv heads are joined until a row of their keys, and one of their values, is whole lines of the memory. They
# have at most MOST_ROWS query rows and MOST_DIMS dimensions. They are not joined where a token sees at most SHORT rows, or where a
# full cache has fewer than MUCH bytes, because programs have little to do then. For padded caches in fast memory, kv heads are
# joined until rows have ENOUGH_BYTES, too, and MUCH_PADDED bytes are much.
LINE, MOST_ROWS, MOST_DIMS, SHORT, MUCH = 128, 16, 512, 256, 64 << 20
# Bytes of a tile, at most. The defaults have fewer, so only a hint can say that fewer kv heads are joined.
MOST_TILE_BYTES = 96 * 1024
ENOUGH_BYTES, MUCH_PADDED = 256, 32 << 20
# An H100 runs the same program with the same multiprocessors. If it takes 1.43 times the time of an H200, which is the ratio of
# their bandwidths, it is still faster than it was with kv heads apart.
CAPABILITY = "9.0"


def joined(problem: Problem, target: Target) -> tuple[Problem, int]:
    """The problem whose kv heads are the joined ones, and how many are one.

    Scales of a quantised cache differ from kv head to kv head, so kv heads are not joined there. Where the value lies in the key's
    rows, there is one kv head as a rule.
    """
    heads, rows = 1, problem.num_tokens * problem.group
    dims = problem.head_dim, problem.value_dim
    row_bytes = [dim * problem.cache_dtype.itemsize for dim in dims]
    easy = has_fast_memory(target) and not problem.paged
    least, much = (ENOUGH_BYTES, MUCH_PADDED) if easy else (LINE, MUCH)
    pays, keys = _pays(problem, target, much), problem.fwd_params.block_size_keys or 0
    while (
        pays
        and any(heads * n % LINE or heads * n < least for n in row_bytes)
        and problem.num_kv_heads % (2 * heads) == 0
        and 2 * heads * rows <= MOST_ROWS
        and 2 * heads * max(dims) <= MOST_DIMS
        and 2 * heads * sum(row_bytes) * keys <= MOST_TILE_BYTES
    ):
        heads *= 2
    wide = {name: heads * getattr(problem, name) for name in ("head_dim", "value_dim", "row_dim")}
    return dataclasses.replace(problem, num_kv_heads=problem.num_kv_heads // heads, **wide), heads


def _pays(problem: Problem, target: Target, much: int) -> bool:
    """Whether joining is faster, if few bytes are less than `much`."""
    if getattr(target.device, "compute_capability", None) != CAPABILITY:
        return False
    # If `num_key_splits` is given, bits must not depend on the batch.
    if problem.cache_dtype.itemsize != 2 or problem.value_columns is not None or problem.fwd_params.num_key_splits:
        return False
    keys = min(problem.seq_len, problem.most_keys or problem.seq_len)
    row_bytes = problem.num_kv_heads * (problem.head_dim + problem.value_dim) * problem.cache_dtype.itemsize
    return keys > SHORT and problem.batch * keys * row_bytes >= much


def joined_cache(cache: Cache, wide: Problem) -> Cache:
    """The cache with the kv heads of `wide`, a joined problem. Nothing is moved."""

    def reshaped(x, dim):
        return x if x is None else x.reshape(*x.shape[:2], wide.num_kv_heads, dim)

    return dataclasses.replace(cache, key=reshaped(cache.key, wide.row_dim), value=reshaped(cache.value, wide.value_dim))
