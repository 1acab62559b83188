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
        combine_heads: query heads that a combine program merges.
        schedule: who works on which keys.
    """

    block_heads: int
    head_blocks: int
    block_dim: int
    combine_heads: int
    schedule: Schedule


WORKERS_PER_SM = 1  # one program fills a multiprocessor's share of the bandwidth; with more, tails grow
OVERHEAD_UNITS = 2
TILE_BYTES = 16 * 1024  # of keys; as many of values. Three of both fit any GPU since Ampere, and keep enough loads in flight.
MULTIPROCESSORS = 132  # where there is no device to ask: an H100's


def resolve(problem, target) -> FwdParams:
    """The hints of `problem` with defaults in the gaps."""
    del target
    defaults = FwdParams(
        block_size_heads=min(max(power_of_two(problem.group), 16), 64),
        block_size_keys=_block_keys(problem),
        num_warps=4,
        num_stages=3,
    )
    return problem.fwd_params.over(defaults)


def forward_tiles(problem, target) -> Tiles:
    """The shape of the forward work for a problem whose hints are resolved."""
    hints = problem.fwd_params
    block_heads = max(hints.block_size_heads, 16)
    return _tiles(problem, target, block_heads, hints.block_size_keys, WORKERS_PER_SM)


def backward_tiles(problem, target) -> Tiles:
    """The shape of the backward work. All heads of a group stand in one block: they add up in d_key and d_value."""
    return _tiles(problem, target, max(power_of_two(problem.group), 16), _block_keys(problem), WORKERS_PER_SM)


def backward_params(problem) -> FwdParams:
    """Warps and stages of the backward kernel."""
    del problem
    return FwdParams(num_warps=8, num_stages=2)


def _block_keys(problem) -> int:
    return min(max(TILE_BYTES // (_block_dim(problem) * problem.dtype.itemsize), 16), 256)


def _block_dim(problem) -> int:
    return max(power_of_two(problem.head_dim), 16)


def _tiles(problem, target, block_heads, block_keys, workers_per_sm) -> Tiles:
    head_blocks = -(-problem.group // block_heads)
    sms = getattr(target.device, "core_count", None) or MULTIPROCESSORS
    splits = problem.fwd_params.num_key_splits
    workers = splits or max(sms * workers_per_sm // (problem.num_kv_heads * head_blocks), 1)
    return Tiles(
        block_heads=block_heads,
        head_blocks=head_blocks,
        block_dim=_block_dim(problem),
        combine_heads=min(max(power_of_two(problem.batch * problem.num_q_heads // (4 * sms)), 1), 4),
        schedule=Schedule(problem.batch, workers, block_keys, splits is not None, 0 if splits else OVERHEAD_UNITS),
    )


def power_of_two(n: int) -> int:
    """The least power of two that is at least n, and 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()
