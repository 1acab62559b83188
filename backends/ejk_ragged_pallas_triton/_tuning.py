"""Sizes of tiles and numbers of programs: the defaults with their reasons, and the checks of hints."""

import dataclasses

from ejk_ragged import FwdParams

from ._schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The static shape of the work.

    Attributes:
        block_heads: query heads of one group in a program; a power of two, 16 at least (the tensor cores' smallest).
        head_blocks: such blocks a group.
        block_dim: head_dim, padded to a power of two.
        padded_dim: whether it had to be padded.
        combine_heads: query heads that a combine program merges.
        schedule: who works on which keys.
    """

    block_heads: int
    head_blocks: int
    block_dim: int
    padded_dim: bool
    combine_heads: int
    schedule: Schedule


WORKERS_PER_SM = 1
OVERHEAD_UNITS = 2
TILE_BYTES = 16 * 1024


def resolve(problem, target) -> FwdParams:
    """The hints of `problem` with defaults in the gaps."""
    del target
    dim = max(power_of_two(problem.head_dim), 16)
    keys = TILE_BYTES // (dim * problem.dtype.itemsize)
    defaults = FwdParams(
        block_size_heads=min(max(power_of_two(problem.group), 16), 64),
        block_size_keys=min(max(keys, 16), 256),
        num_warps=4,
        num_stages=3,
    )
    return problem.fwd_params.over(defaults)


def tiles(problem, target) -> Tiles:
    """The shape of the work for a problem whose hints are resolved."""
    hints = problem.fwd_params
    dim = max(power_of_two(problem.head_dim), 16)
    block_heads = max(hints.block_size_heads, 16)
    head_blocks = -(-problem.group // block_heads)
    sms = getattr(target.device, "core_count", None) or 132
    by_sequence = hints.num_key_splits is not None
    workers = hints.num_key_splits if by_sequence else max(sms * WORKERS_PER_SM // (problem.num_kv_heads * head_blocks), 1)
    return Tiles(
        block_heads=block_heads,
        head_blocks=head_blocks,
        block_dim=dim,
        padded_dim=dim != problem.head_dim,
        combine_heads=min(max(power_of_two(problem.batch * problem.num_q_heads // (4 * sms)), 1), 4),
        schedule=Schedule(problem.batch, workers, hints.block_size_keys, by_sequence, 0 if by_sequence else OVERHEAD_UNITS),
    )


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()
