"""Sizes of tiles, and numbers of programs, warps and stages: the defaults with their reasons, and the checks of hints."""

import dataclasses
import functools
import itertools
import math

from ejk_ragged import FwdParams, Problem, Target
from ejk_ragged_schedule import Schedule
from ejk_ragged_schedule.devices import has_fast_memory, multiprocessors
from ejk_ragged_schedule.sizes import most_keys

from ._joined import joined
from ._parts import Part


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The static shape of the work of an operation, which is two kernels: one reads the cache, and one merges partial results.

    Attributes:
        block_rows: number of query rows per program of the first kernel. A power of two, and at least 16, which is the smallest
            tile of the tensor cores.
        row_blocks: number of blocks of query rows per kv head.
        key_parts, value_parts: the dimensions of keys and values, in parts that are powers of two.
        unused_parts: the columns of a row that are neither key nor value, if they have a gradient, in such parts.
        num_warps, num_stages: warps and stages of the first kernel.
        merge_rows: number of query rows per program of the merging kernel.
        merge_slots: number of partial results that the merging kernel loads at a time.
        merge_warps: warps of the merging kernel.
        schedule: which program works on which keys.
        joined_heads: how many kv heads are one, see `_joined`.
    """

    block_rows: int
    row_blocks: int
    key_parts: tuple[Part, ...]
    value_parts: tuple[Part, ...]
    unused_parts: tuple[Part, ...]
    num_warps: int
    num_stages: int
    merge_rows: int
    merge_slots: int
    merge_warps: int
    schedule: Schedule
    joined_heads: int = 1

    @property
    def key_width(self) -> int:
        """Number of dimensions of a key, with the padding of the last part."""
        return width_of(self.key_parts)


# The defaults, measured on an H100. docs/developers/pallas-triton.md has the measurements.

# Bytes of keys per tile, and bytes of values: enough loads in flight, and small enough for three stages.
TILE_BYTES = 16 * 1024
# Keys per tile, at most.
MOST_KEYS = 256
# Keys per tile of a quantised cache, at most. The number is smaller, because tiles are widened in registers. A tile of float8 also
# has no more keys than a head has dimensions, unless that is below FEW_QUANTISED_KEYS.
MOST_QUANTISED_KEYS = 128
# The same for more than 16 query rows per program, and in the backward kernel.
FEW_QUANTISED_KEYS = 64
# If the query has 16 bits, a quantised cache with a head dimension above WIDE has tiles of FEW_QUANTISED_KEYS keys, 8 warps, and
# blocks of at most 16 query rows. Four warps have no room in their registers for a widened tile and the sums.
WIDE = 256
NUM_WARPS_IF_WIDE = 8
MOST_ROWS_IF_WIDE = 16
# If a program has at most this many tiles of a quantised cache, tiles are halved, so that more programs have work ...
FEW_TILES = 4
# ... but have at least this many keys.
LEAST_QUANTISED_KEYS = 32
# Warps per program. Eight warps wait for each other in the softmax, and two are too few for a tile.
NUM_WARPS = 4
# Stages: two tiles are on their way while the program works on one.
NUM_STAGES = 3
# Programs per multiprocessor, by whether the cache is quantised. All programs run from the beginning to the end. One program per
# multiprocessor gets an equal share of the bandwidth. But an 8-bit tile takes longer to work on than to load, so that two programs,
# which work and load in turn, are faster.
PROGRAMS = {False: 1, True: 2}
# In the backward operation, a tile that would have fewer keys, because a row has many columns, has FEW_KEYS of them and 8 warps.
FEW_KEYS = 32
# If a block of queries has more numbers than this, the backward kernel loads the block after the tile of a quantised cache, and not
# before. A block that is loaded first waits in registers, where widened tiles leave little room.
SMALL_BLOCK = 16 * 128
# Tiles have this many times as many keys for a cache in pages, because the loop waits a little for each tile's pages, and where
# the memory is fast, because the work of a tile would take longer than its loads. For a head dimension up to NARROW, whose tiles
# have many keys, and where they would have more than LARGE_BYTES, only tiles of pages are large. No tiles are for WHOLE_STAGES_FROM
# query rows, or if `num_key_splits` is given, so that the bits of pages and of padded caches are the same.
LARGE, NARROW, LARGE_BYTES = 2, 64, 72 * 1024
# Partial results of a sequence that the merging kernel loads at a time, at most.
MOST_MERGED = 32

# An H100's, for use if there is no device to ask.
CAPABILITY = "9.0"
# Shared memory per program, at most, in KiB (CUDA C++ Programming Guide, technical specifications per compute capability).
SHARED_MEMORY = {"8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227, "10.3": 227, "11.0": 227}
# The same for any other compute capability.
SHARED_MEMORY_ELSEWHERE = 99
# Bytes of shared memory that the system reserves per program. A multiprocessor has as much shared memory as one program may have,
# plus this reserve.
RESERVED = 1024
# Query rows per block, at most. Each further block reads the cache again.
MAX_ROWS = 64
# Sums per block, at most: query rows times dimensions. Next to a tile, registers hold no more.
MOST_SUMS = 32 * 576
# From this number of query rows on, the tensor cores read their operands from shared memory, so a stage is in use for longer.
WHOLE_STAGES_FROM = 64


def resolve(problem: Problem, target: Target) -> FwdParams:
    """The hints of `problem`, checked, with defaults for the fields that are None.

    Raises:
        ValueError: a hint cannot work. The message names the field.
    """
    given = problem.fwd_params
    wide, heads = joined(problem, target)
    default_keys = functools.partial(default_block_keys, wide, fast=has_fast_memory(target) or heads > 1, target=target)
    for name, least in (("block_size_heads", 1), ("block_size_keys", 16), ("num_warps", 1)):
        value = getattr(given, name)
        if value is not None and (value < least or value != power_of_two(value)):
            raise ValueError(f"FwdParams.{name} must be a power of two and at least {least} for pallas_triton, got {value}.")
    if given.num_warps is not None and given.num_warps > 32:
        raise ValueError(f"FwdParams.num_warps must be at most 32 for pallas_triton, got {given.num_warps}.")

    def fits(rows):
        keys = given.block_size_keys or default_keys(rows)
        return shared_bytes(wide, keys, rows, 1, backward=False) <= _shared_memory(target)

    rows = given.block_size_heads or fitting_rows(wide, fits, backward=False)
    keys = given.block_size_keys or default_keys(rows)
    needs = functools.partial(shared_bytes, wide, keys, rows, backward=False)
    # For a quantised cache and a large block, two stages, so that two programs fit on a multiprocessor.
    most_stages = 2 if problem.quantised and rows >= WHOLE_STAGES_FROM else NUM_STAGES
    stages = given.num_stages or _fitting_stages(needs, target, most_stages)
    if needs(stages) > _shared_memory(target):
        raise ValueError(
            f"FwdParams.block_size_keys {keys}, block_size_heads {rows} and num_stages {stages} need about {needs(stages)} bytes "
            f"of shared memory for {problem}; a program has {_shared_memory(target)} on this device. Give smaller ones."
        )
    warps = given.num_warps or (NUM_WARPS_IF_WIDE if is_wide(wide) else NUM_WARPS)
    return dataclasses.replace(given, block_size_heads=rows, block_size_keys=keys, num_warps=warps, num_stages=stages)


def candidates(problem: Problem, target: Target):
    """Hints for the tuner to try: the combinations near the defaults that fit into shared memory."""
    default = tile_keys(joined(problem, target)[0])
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
    """The shape of the forward operation for a problem whose hints are resolved."""
    hints = problem.fwd_params
    block_rows = max(hints.block_size_heads or 0, 16)
    wide, heads = joined(problem, target)
    needs = functools.partial(shared_bytes, wide, hints.block_size_keys, block_rows, backward=False)
    merged = widest(parts_of(problem, backward=False))
    parts = parts_of(wide, backward=False)
    tiles = _tiles(wide, target, parts, merged, block_rows, hints.block_size_keys, hints.num_warps, hints.num_stages, needs)
    return dataclasses.replace(tiles, joined_heads=heads)


def backward_tiles(problem: Problem, target: Target, *, key_value: bool = True) -> Tiles:
    """The shape of the backward operation, which uses no hint but `num_key_splits`.

    `key_value` says whether d_key and d_value are wanted.
    """
    parts = parts_of(problem, backward=True)
    # A column that is key and value is loaded once. Its gradient is two products, whose operands wait in registers.
    columns = sum(map(width_of, parts[:2])) if key_value else row_width(problem, backward=True)
    most_keys = tile_keys(problem, columns)

    def keys_and_warps(rows):
        few = most_keys < FEW_KEYS and problem.cache_dtype.itemsize == 2
        if few and shared_bytes(problem, FEW_KEYS, rows, 2, backward=True) <= _shared_memory(target):
            return FEW_KEYS, NUM_WARPS_IF_WIDE
        # Warps exchange tiles of probabilities and of their gradients, [rows, keys]. Such a tile has at most TILE_BYTES, too.
        keys = min(most_keys, max(TILE_BYTES // (rows * problem.dtype.itemsize), 16))
        return min(keys, FEW_QUANTISED_KEYS) if problem.quantised else keys, NUM_WARPS

    def needs(rows, stages):
        return shared_bytes(problem, keys_and_warps(rows)[0], rows, stages, backward=True)

    rows = fitting_rows(problem, lambda rows: needs(rows, 1) <= _shared_memory(target), backward=True)
    of_stages = functools.partial(needs, rows)
    stages = _fitting_stages(of_stages, target, 2 if problem.quantised else NUM_STAGES)
    return _tiles(problem, target, parts, widest(parts), rows, *keys_and_warps(rows), stages, of_stages)


def refuses_backward(problem: Problem, target: Target) -> str | None:
    """Why another backend should do the backward operation, or None if this one should."""
    tiles = backward_tiles(problem, target, key_value=has_cache_gradients(problem))
    if tiles.row_blocks > 1 and problem.value_columns is not None and has_cache_gradients(problem):
        return f"XLA is faster at gradients of rows that are both key and value for more than {tiles.block_rows} query rows"
    needs = shared_bytes(problem, tiles.schedule.block_keys, tiles.block_rows, tiles.num_stages, backward=True)
    room = _shared_memory(target)
    return f"its gradients need about {needs} bytes of shared memory, and a program has {room}" if needs > room else None


def parts_of(problem: Problem, *, backward: bool) -> tuple[tuple[Part, ...], tuple[Part, ...], tuple[Part, ...]]:
    """The parts of the key, of the value, and of the columns that are neither and have a gradient.

    The backward operation writes each part once. If the value is in the key's rows, rows are cut where the key ends and where the
    value begins and ends. A part of a row is then used as a whole or not at all, by the key as by the value.
    """
    if problem.value_columns is None or not backward:
        return Part.of(problem.head_dim), Part.of(problem.value_dim), ()
    first, end = problem.value_columns
    cuts = sorted({0, first, end, problem.head_dim, problem.row_dim})
    row = [part for low, high in itertools.pairwise(cuts) for part in Part.of(high, low)]
    key, value = ([part for part in row if low <= part.first < high] for low, high in ((0, problem.head_dim), (first, end)))
    unused = [part for part in row if part not in key and part not in value]
    return tuple(key), tuple(part.moved(-first) for part in value), tuple(unused)


def has_cache_gradients(problem: Problem) -> bool:
    """Whether d_key and d_value are ever wanted."""
    return not (problem.paged or problem.quantised)


def fitting_rows(problem: Problem, fits, *, backward: bool) -> int:
    """Number of query rows per block: all query rows of a kv head, or fewer if they exceed `MAX_ROWS`, `MOST_SUMS` or `fits`."""
    # The tensor cores take 16 query rows at least. A smaller block is padded.
    most = min(max(power_of_two(problem.num_tokens * problem.group), 16), MOST_ROWS_IF_WIDE if is_wide(problem) else MAX_ROWS)
    dims = widest(parts_of(problem, backward=backward))
    return next((rows for rows in (64, 32) if rows <= most and rows * dims <= MOST_SUMS and fits(rows)), 16)


def default_block_keys(problem: Problem, rows: int, *, fast: bool, target: Target) -> int:
    """Number of keys per tile, for blocks of `rows` query rows. It does not depend on the batch if `num_key_splits` is given.

    `fast` says whether a tile arrives fast: because the memory is fast, or because kv heads are joined.
    """
    keys = tile_keys(problem)
    if not problem.quantised:
        fits = keys * LARGE * row_width(problem, backward=False) * problem.cache_dtype.itemsize <= LARGE_BYTES
        large = problem.paged or (fast and fits and problem.head_dim > NARROW)
        return keys * LARGE if large and rows < WHOLE_STAGES_FROM and not problem.fwd_params.num_key_splits else keys
    if is_wide(problem):
        return FEW_QUANTISED_KEYS
    if rows > 16:
        return min(keys, FEW_QUANTISED_KEYS)
    if not problem.fwd_params.num_key_splits:
        programs = PROGRAMS[True] * multiprocessors(target) // problem.num_kv_heads
        all_keys = problem.batch * most_keys(problem)
        while keys > LEAST_QUANTISED_KEYS and all_keys <= FEW_TILES * keys * programs:
            keys //= 2
    return keys


def tile_keys(problem: Problem, columns: int | None = None) -> int:
    """Number of keys per tile of `TILE_BYTES`, within bounds. `columns` is the number of columns per row, by default up to the last
    one that is used."""
    if columns is None and problem.value_columns is not None:
        columns = max(width_of(Part.of(problem.head_dim)), problem.value_columns[1])
    columns = columns or row_width(problem, backward=False)
    # For float32 queries, the size of the widened tile counts.
    itemsize = max(problem.cache_dtype.itemsize, 4 if problem.dtype.itemsize == 4 else 1)
    most = MOST_QUANTISED_KEYS if problem.quantised else MOST_KEYS
    if problem.cache_dtype.name.startswith("float8"):
        most = min(most, max(power_of_two(problem.head_dim), FEW_QUANTISED_KEYS))
    keys = 2 * TILE_BYTES / (columns * itemsize)
    return min(max(1 << round(math.log2(keys)), 16), most)


def is_wide(problem: Problem) -> bool:
    """Whether the cache is quantised, the query has 16 bits, and a head dimension is above `WIDE`."""
    return problem.quantised and problem.dtype.itemsize == 2 and max(problem.head_dim, problem.value_dim) > WIDE


def row_width(problem: Problem, *, backward: bool) -> int:
    """Number of columns that are loaded per row of the cache, for key and value together, with padding."""
    key, value, _ = parts_of(problem, backward=backward)
    if problem.value_columns is None:
        return width_of(key) + width_of(value)
    first, _ = problem.value_columns
    return width_of({*key, *(part.moved(first) for part in value)})


def widest(parts) -> int:
    """Number of dimensions of the key or of the value, whichever has more, with padding."""
    return max(map(width_of, parts[:2]))


def width_of(parts) -> int:
    return sum(part.size for part in parts)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n, and 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def _tiles(problem, target, parts, dim, block_rows, block_keys, num_warps, num_stages, needs) -> Tiles:
    rows = problem.num_tokens * problem.num_q_heads
    row_blocks = -(-problem.num_tokens * problem.group // block_rows)
    splits = problem.fwd_params.num_key_splits
    processors = multiprocessors(target)
    programs = PROGRAMS[problem.quantised]
    while programs * (needs(num_stages) + RESERVED) > _shared_memory(target) + RESERVED:
        programs -= 1
    schedule = Schedule.of(problem, programs * processors // (problem.num_kv_heads * row_blocks), block_keys)

    # Merging is short, so there are only as many programs as run at once, with a few query rows each. The shape of this work sets
    # the order of sums. If `num_key_splits` is given, the shape must not depend on the batch.
    rows_each = 1 if splits else power_of_two(problem.batch * rows // (4 * processors))
    merge_rows = min(rows_each, 4, max(512 // dim, 1))
    merge_slots = min(max(power_of_two(schedule.slots // problem.batch), 8), MOST_MERGED)
    merge_warps = min(max(power_of_two(merge_rows * merge_slots * dim // 4096), 1), 8)
    merge = merge_rows, merge_slots, merge_warps
    key, value, unused = parts
    return Tiles(block_rows, row_blocks, key, value, unused, num_warps, num_stages, *merge, schedule)


def shared_bytes(problem, block_keys, block_rows, stages, *, backward) -> int:
    """An estimate of the bytes of shared memory that a program needs. Observed programs need this much or somewhat less.

    Each stage holds a tile of keys, a tile of values, and the blocks of query rows that are loaded with them. The last stage is in
    registers, except where the terms below say otherwise. Shared memory also holds sums over query rows, and tiles [rows, keys]
    whose layout changes.
    """
    rows, width = max(block_rows, 16), row_width(problem, backward=backward)
    parts = parts_of(problem, backward=backward)
    dim = widest(parts)
    whole = rows >= WHOLE_STAGES_FROM
    blocks, layouts = (2, 3) if backward else (1, 1)
    queries = blocks * rows * dim * problem.dtype.itemsize
    stage = block_keys * width * problem.cache_dtype.itemsize + queries
    weights = 4 if backward and problem.quantised else problem.dtype.itemsize
    # For float32 queries, a quantised tile is widened in shared memory. So are the values of a wide one, if two products read them.
    twice = is_wide(problem) and problem.keeps_accum_dtype
    widened = block_keys * dim * (4 if problem.quantised and problem.dtype.itemsize == 4 else 2 if twice else 0)
    if stages == 1:
        return stage + queries * whole + widened
    sums = (8 if backward else 6) * rows * dim + 4096 if whole and problem.quantised else (rows + 2) * 1024 + 4096 * (rows > 16)
    # Gradients of 16 bits change their layout before they are stored: 16 rows of a part at a time.
    stored = 64 * (max(part.size for part in itertools.chain(*parts)) + 8) if backward and problem.cache_dtype.itemsize == 2 else 0
    beside = max(sums, stored, layouts * rows * block_keys * weights + 2048) + widened
    loaded = stages - (not whole or problem.quantised)
    # For d_key and d_value, a loop over one further block of query rows is unrolled. Both blocks are then loaded with a tile.
    if not (backward and has_cache_gradients(problem) and rows < problem.num_tokens * problem.group <= 2 * rows):
        return stage * loaded + beside
    both = block_keys * width * problem.cache_dtype.itemsize + 2 * rows * sum(map(width_of, parts[:2])) * problem.dtype.itemsize
    return max(stage * loaded + beside, both * loaded + rows * block_keys * weights + 10240)


def _fitting_stages(needs, target, most=NUM_STAGES) -> int:
    return next((stages for stages in range(most, 1, -1) if needs(stages) <= _shared_memory(target)), 1)


def _shared_memory(target) -> int:
    """Bytes of shared memory per program, at most."""
    capability = str(getattr(target.device, "compute_capability", CAPABILITY))
    by_capability = SHARED_MEMORY.get(capability, SHARED_MEMORY_ELSEWHERE) * 1024
    return getattr(target.device, "shared_memory_per_block_optin", by_capability)
