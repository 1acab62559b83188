"""Sizes of tiles, numbers of programs, warps and stages: the defaults with their reasons, and the checks of hints."""

import dataclasses
import functools

from ejk_ragged import FwdParams, Problem, Target

from ._schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The static shape of the work.

    Attributes:
        block_heads: query heads of one group in a program; a power of two, 16 at least (the tensor cores' smallest).
        head_blocks: such blocks a group.
        block_dim: head_dim, padded to a power of two.
        num_warps, num_stages: of the kernel that walks through the cache.
        merge_heads, merge_slots, merge_warps: query heads of a program that merges partials, partials at a time, and its warps.
        schedule: who works on which keys.
    """

    block_heads: int
    head_blocks: int
    block_dim: int
    num_warps: int
    num_stages: int
    merge_heads: int
    merge_slots: int
    merge_warps: int
    schedule: Schedule


# The defaults, measured on an H100; docs/performance has the log.
TILE_BYTES = 16 * 1024  # of keys in a tile, and as many of values: enough in flight, and small enough for three stages
NUM_WARPS = 4  # eight wait for each other in the softmax, two are too few for a tile
NUM_STAGES = 3  # two tiles on their way while one is worked on
LEAST_STRETCHES = 4  # of a line, however few sequences are on it; fewer and longer ones are read more slowly again
# One program a multiprocessor, all of them there from the beginning to the end: each gets an equal share of the bytes, and an equal
# share of the bandwidth. More programs than fit at once leave a tail.

# What there is to a device, where there is no device to ask: an H100.
MULTIPROCESSORS = 132
CAPABILITY = "9.0"
# Shared memory that one program may have, in KiB (CUDA C++ Programming Guide, technical specifications per compute capability).
SHARED_MEMORY = {"8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227, "10.3": 227, "11.0": 227}
SHARED_MEMORY_ELSEWHERE = 99
# Of heads from here on the tensor cores take their operands from shared memory, and hold on to a stage for longer.
WHOLE_STAGES_FROM = 64


def resolve(problem: Problem, target: Target) -> FwdParams:
    """The hints of `problem`, checked, with defaults in the gaps.

    Raises:
        ValueError: a hint cannot work, naming the field.
    """
    given = problem.fwd_params
    for name, least in (("block_size_heads", 1), ("block_size_keys", 16), ("num_warps", 1)):
        value = getattr(given, name)
        if value is not None and (value < least or value != power_of_two(value)):
            raise ValueError(f"FwdParams.{name} must be a power of two and at least {least} for pallas_triton, got {value}.")
    if given.num_warps is not None and given.num_warps > 32:
        raise ValueError(f"FwdParams.num_warps must be at most 32 for pallas_triton, got {given.num_warps}.")
    # A block of fewer heads than the tensor cores take is padded, so that any group has one.
    heads = given.block_size_heads or min(max(power_of_two(problem.group), 16), 64)
    keys = given.block_size_keys or default_block_keys(problem)
    needs = functools.partial(shared_bytes, problem, keys, heads, backward=False)
    stages = given.num_stages or _fitting_stages(needs, target)
    if needs(stages) > _shared_memory(target):
        raise ValueError(
            f"FwdParams.block_size_keys {keys}, block_size_heads {heads} and num_stages {stages} need about {needs(stages)} bytes "
            f"of shared memory for {problem}; a program has {_shared_memory(target)} on this device. Give smaller ones."
        )
    return dataclasses.replace(
        given, block_size_heads=heads, block_size_keys=keys, num_warps=given.num_warps or NUM_WARPS, num_stages=stages
    )


def candidates(problem: Problem, target: Target):
    """Hints for the tuner to try: around the defaults, those that fit."""
    default = default_block_keys(problem)
    for keys in (default, 2 * default, max(default // 2, 16)):
        for warps in (NUM_WARPS, 2 * NUM_WARPS):
            for stages in (NUM_STAGES, NUM_STAGES + 1, NUM_STAGES - 1):
                hints = FwdParams(block_size_keys=keys, num_warps=warps, num_stages=stages)
                try:
                    resolve(dataclasses.replace(problem, fwd_params=hints), target)
                except ValueError:
                    continue
                yield hints


def forward_tiles(problem: Problem, target: Target) -> Tiles:
    """The shape of the forward work for a problem whose hints are resolved."""
    hints = problem.fwd_params
    block_heads = max(hints.block_size_heads or 0, 16)
    return _tiles(problem, target, block_heads, hints.block_size_keys, hints.num_warps, hints.num_stages)


def backward_tiles(problem: Problem, target: Target) -> Tiles:
    """The shape of the backward work. All heads of a group stand in one block: they add up in d_key and d_value."""
    block_heads = max(power_of_two(problem.group), 16)
    # Probabilities and their gradients pass between warps: in tiles no larger than those of keys.
    block_keys = min(default_block_keys(problem), TILE_BYTES // (block_heads * problem.dtype.itemsize))
    stages = _fitting_stages(functools.partial(shared_bytes, problem, block_keys, block_heads, backward=True), target)
    return _tiles(problem, target, block_heads, block_keys, NUM_WARPS, stages)


def default_block_keys(problem: Problem) -> int:
    return min(max(TILE_BYTES // (block_dim(problem) * problem.dtype.itemsize), 16), 256)


def block_dim(problem: Problem) -> int:
    return max(power_of_two(problem.head_dim), 16)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n, and 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def _tiles(problem, target, block_heads, block_keys, num_warps, num_stages) -> Tiles:
    head_blocks = -(-problem.group // block_heads)
    splits = problem.fwd_params.num_key_splits
    multiprocessors = getattr(target.device, "core_count", None) or MULTIPROCESSORS
    workers = splits or max(multiprocessors // (problem.num_kv_heads * head_blocks), 1)
    if splits:
        schedule = Schedule(problem.batch, problem.seq_len, workers, block_keys, by_sequence=True)
    else:
        # As many share a stretch as leave one for each sequence: each sequence more on it is a piece more for all of them.
        share = max(workers // max(problem.batch, LEAST_STRETCHES), 1)
        deal = 1 << (share.bit_length() - 1)  # the power of two below
        workers -= workers % deal
        schedule = Schedule(problem.batch, problem.seq_len, workers, block_keys, by_sequence=False, deal=deal)

    # Merging is short: as many programs as run at once, each with a few heads. The shape of that work sets the order of the sums,
    # so with splits given it must not depend on the batch.
    dim = block_dim(problem)
    heads_each = 1 if splits else power_of_two(problem.batch * problem.num_q_heads // (4 * multiprocessors))
    merge_heads = min(heads_each, 4, max(512 // dim, 1))
    merge_slots = min(max(power_of_two(schedule.slots // problem.batch), 8), 16)
    merge_warps = min(max(merge_heads * merge_slots * dim // 4096, 1), 8)
    return Tiles(block_heads, head_blocks, dim, num_warps, num_stages, merge_heads, merge_slots, merge_warps, schedule)


def shared_bytes(problem, block_keys, block_heads, stages, *, backward) -> int:
    """Bytes of shared memory that a program needs: what the compiler was seen to take on an H100, or somewhat more.

    A stage holds a tile of keys and one of values, and the blocks of heads that are loaded beside them. The last stage is at work
    in registers, and beside the others there are sums over heads, and tiles [heads, keys] that change their layout.
    """
    block_heads, itemsize = max(block_heads, 16), problem.dtype.itemsize
    blocks, layouts = (2, 3) if backward else (1, 1)
    stage = (2 * block_keys + blocks * block_heads) * block_dim(problem) * itemsize
    if stages == 1:
        return stage
    beside = max((block_heads + 2) * 1024, layouts * block_heads * block_keys * itemsize + 2048)
    return stage * (stages - (block_heads < WHOLE_STAGES_FROM)) + beside


def _fitting_stages(needs, target) -> int:
    return next((stages for stages in range(NUM_STAGES, 1, -1) if needs(stages) <= _shared_memory(target)), 1)


def _shared_memory(target) -> int:
    """Bytes of shared memory that one program may have."""
    capability = str(getattr(target.device, "compute_capability", CAPABILITY))
    by_capability = SHARED_MEMORY.get(capability, SHARED_MEMORY_ELSEWHERE) * 1024
    return getattr(target.device, "shared_memory_per_block_optin", by_capability)
