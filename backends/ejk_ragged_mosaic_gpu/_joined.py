"""How many kv heads of an 8-bit cache are one wide head, see `ejk_ragged_schedule.joined`. Each keeps scales of its own."""

from typing import NamedTuple

from ejk_ragged import Problem, Target
from ejk_ragged_schedule.devices import has_fast_memory
from ejk_ragged_schedule.joined import with_joined_heads
from ejk_ragged_schedule.sizes import most_bytes, most_keys


class Joining(NamedTuple):
    """How kv heads of a head dimension are joined.

    Attributes:
        heads: how many are one.
        most_rows: query rows of all of them, at most: as many as threads have registers for.
        least_bytes: bytes of a full cache, at least. Programs have little to do in a smaller one.
    """

    heads: int
    most_rows: int
    least_bytes: int


# By head dimension, where the memory is fast, as measured on an H200. Rows are then whole lines of 64 bytes.
JOINED = {64: Joining(2, 32, 16 << 20), 80: Joining(4, 16, 48 << 20), 96: Joining(4, 16, 128 << 20), 112: Joining(4, 16, 96 << 20)}
SHORT = 256  # none are joined where a token sees at most so many rows


def joined(problem: Problem, target: Target) -> tuple[Problem, int]:
    """The problem whose kv heads are the joined ones, and how many are one."""
    joining = JOINED.get(problem.head_dim) if has_fast_memory(target) else None
    heads = joining.heads if joining and _can_join(problem, joining) else 1
    return with_joined_heads(problem, heads), heads


def _can_join(problem: Problem, joining: Joining) -> bool:
    rows = joining.heads * problem.num_tokens * problem.group
    # A hint of fewer query rows per block is one for kv heads apart. With `num_key_splits`, bits must not depend on the batch.
    hinted = rows > (problem.fwd_params.block_size_heads or rows) or problem.fwd_params.num_key_splits
    alike = problem.value_columns is None and problem.value_dim == problem.head_dim
    if not (problem.quantised and alike and problem.num_kv_heads % joining.heads == 0) or hinted:
        return False
    return rows <= joining.most_rows and most_keys(problem) > SHORT and most_bytes(problem) >= joining.least_bytes
