"""Several kv heads as one wide head, because copies of few bytes per row are slow. A program has the query rows of all of them.

The rows of neighbouring kv heads lie side by side in the cache. A query row has zeros in the columns of the other kv heads, and
uses its own columns of the output. The tensor cores multiply more query rows than there often are, so the further ones cost little.
"""

import dataclasses

from ejk_ragged import Cache, Problem


def with_joined_heads(problem: Problem, heads: int) -> Problem:
    """The problem in which `heads` neighbouring kv heads are one."""
    wide = {name: heads * getattr(problem, name) for name in ("head_dim", "value_dim", "row_dim")}
    return dataclasses.replace(problem, num_kv_heads=problem.num_kv_heads // heads, **wide)


def joined_cache(cache: Cache, wide: Problem) -> Cache:
    """The cache with the kv heads of `wide`, a joined problem. Nothing is moved. Scales stay those of the kv heads apart."""

    def reshaped(x, dim):
        return x if x is None else x.reshape(*x.shape[:2], wide.num_kv_heads, dim)

    return dataclasses.replace(cache, key=reshaped(cache.key, wide.row_dim), value=reshaped(cache.value, wide.value_dim))
