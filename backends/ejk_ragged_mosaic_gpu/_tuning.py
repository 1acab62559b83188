"""The shape of the work for a problem: the defaults with their reasons, the checks of hints, and what does not fit."""

import dataclasses
import functools
import math

from ejk_ragged import FwdParams, Problem, Target
from ejk_ragged_schedule import Schedule
from ejk_ragged_schedule.devices import has_fast_memory, multiprocessors
from ejk_ragged_schedule.sizes import most_bytes

from ._joined import joined
from ._tiles import (
    BLOCK_SEQUENCES,
    ITEMSIZE,
    LEAST_SCALES,
    MOST_TERMS,
    OPERAND_DIM,
    round_up,
    table_entries,
    Tiles,
    WIDENING_REGISTERS,
)


# The defaults, as measured on an H100. docs/developers has the log.

# Query rows per block. Up to FEW query rows are columns of the products, up to FEW_OF_16_BITS if no head dimension is above
# OPERAND_DIM in 16 bits, or up to MOST_FEW if they cannot be rows. More are rows of the products: MANY has the size of a block for
# 1, 2, 3, and 4 or more times 64 query rows. Each block reads the cache again.
FEW, FEW_OF_16_BITS, MOST_FEW, MANY = 32, 16, 64, (64, 128, 192, 128)
# The same as FEW for wide tiles that a pair can have, where the cache, if full, has MUCH_WIDE bytes: else a pair begins too late.
WIDE_FEW, MUCH_WIDE = 16, 256 << 20
BLOCK_KEYS = 64  # keys per tile: what the tensor cores take at once
# Keys per tile with several blocks, and of a pair if they fit: the tensor cores set the pace, and read the query half as often.
MANY_KEYS = 128
STAGE_BYTES = 64 * 1024  # of tiles that are on their way or worked on; more tiles would wait for each other
NARROW_BYTES, FEW_NARROW_BYTES = 48 * 1024, 128 * 1024  # the same for tiles of 8 bits, and for those that are widened in registers
TAKERS = 2  # warpgroups that take tiles in turn, and widen them in registers. With 3, they have too few registers
PAIR_STAGES = 2  # halves of tiles per pair: one place for each. With more places each step computes addresses, which takes longer
# Two warpgroups ask for their products in turn for one block of so many query rows, with this head dimension and 16 bits. As
# measured on an H200, that is faster. It is slower for 8 bits and for several blocks.
TURNS = 128, 128
WIDE_STAGES = 3  # widened tiles per program: with 2, the warpgroups that multiply wait more often
MOST_ENTRIES = 256  # of the table of a pair
PARTS = 192, 128, 64  # columns of a part of a wide tile of 8 bits, which is widened part by part
PART_BYTES = 72 * 1024, 48 * 1024  # of narrow parts, for up to 16 query rows and for more
# Rounds of tiles for which a change of sequence counts, as measured on an H200. The second is for a pair and for tiles that are
# widened in shared memory, whose rounds take longer. It is 0 where a program waits for memory, and changes meanwhile.
CHANGE, CHANGE_OF_LONG = 2, 1
WIDE, WIDE_IN_REGISTERS = 256, 512  # head dimensions of one warpgroup, at most; the second where it widens tiles of 8 bits
# Where query rows are many, entries of the page table are looked up without waiting for pages of up to so many rows, as measured on
# an H200. For larger pages a look-up without waiting is faster in some calls, and slower in others.
EARLY_PAGE = 16
LEAST_COLUMNS = 16  # per line of a tile: 32 bytes, the least that copies and products take
# The second kernel.
MERGE_ROWS = 1, 2, 4, 8, 16, 32  # query rows that a program may merge at once
MERGE_PARTS = 4  # parts of query rows that a program merges at once, at most
MERGE_DIMS = 128  # dimensions that a program merges at once: where a warp has a query row, each thread then loads 16 bytes
MERGE_NUMBERS = 16 * 1024  # numbers of partial results that a program has in registers at once
MERGE_PROGRAMS = 4  # programs per multiprocessor: as many as find room next to one of the first kernel

# An H100's, for lowering without a device.
SHARED_MEMORY = 227 * 1024


def resolve(problem: Problem, target: Target) -> FwdParams:
    """The hints of `problem`, checked, with defaults in the gaps. Sizes are rounded up to what the tensor cores and the form take.

    Raises:
        ValueError: a hint cannot work, naming the field.
    """
    one, given = problem, problem.fwd_params
    problem, heads = joined_heads(problem, target)
    rows = _block_rows(problem, given.block_size_heads)
    keys = round_up(given.block_size_keys or _block_keys(problem, rows), 64)
    if _by_pair(problem, rows) and (given.block_size_keys is None or problem.keeps_accum_dtype):
        keys = keys if _bytes(problem, keys, rows, PAIR_STAGES, target, heads) <= shared_memory(target) else BLOCK_KEYS
    if given.block_size_heads is None:
        least = lambda rows: PAIR_STAGES if _by_pair(problem, rows) else round_up(given.num_stages or 2, _stage_step(problem, rows))
        while rows > least_rows(problem) and _bytes(problem, keys, rows, least(rows), target, heads) > shared_memory(target):
            rows = rows - 64 if rows > 64 else max(rows // 16 * 8, 8)
    pair = _by_pair(problem, rows)
    step = _stage_step(problem, rows)
    stages = PAIR_STAGES if pair else round_up(given.num_stages or default_stages(problem, keys, rows), step)
    # The gradients of a call keep two terms per weight, and get the hints of the call.
    may_have_fewer = not pair and (not given.num_stages or problem.keeps_accum_dtype)
    while may_have_fewer and stages > step and _bytes(problem, keys, rows, stages, target, heads) > shared_memory(target):
        stages -= step
    needs = _bytes(problem, keys, rows, stages, target, heads)
    if needs > shared_memory(target):
        raise ValueError(
            f"FwdParams.block_size_keys {keys}, block_size_heads {rows} and num_stages {stages} need {needs} bytes of shared "
            f"memory for {one}; a program of mosaic_gpu has {shared_memory(target)} on this device. Give smaller ones."
        )
    return dataclasses.replace(given, block_size_heads=rows, block_size_keys=keys, num_stages=stages)


def joined_heads(problem: Problem, target: Target) -> tuple[Problem, int]:
    """What `joined` returns, if the smallest tiles fit that the hints of the problem allow. Else kv heads are apart."""
    (wide, heads), hints = joined(problem, target), problem.fwd_params
    keys, rows = round_up(hints.block_size_keys or BLOCK_KEYS, 64), _block_rows(wide, hints.block_size_heads)
    stages = round_up(hints.num_stages or TAKERS, _stage_step(wide, rows))
    fits = heads == 1 or _bytes(wide, keys, rows, stages, target, heads) <= shared_memory(target)
    return (wide, heads) if fits else (problem, 1)


def least_rows(problem: Problem) -> int:
    """Query rows of the smallest block: where a warpgroup of its own widens tiles, query rows are rows of the products."""
    return 64 if problem.quantised and not is_wide(problem) and not widens_in_registers(problem, 8) else 8


def default_stages(problem: Problem, keys: int, rows: int) -> int:
    """Stages of about `STAGE_BYTES`: two at least, so that keys are on their way while values are worked on."""
    if _by_pair(problem, rows):
        return PAIR_STAGES
    if is_wide(problem) and problem.quantised:
        return max(PART_BYTES[rows > 16] // (keys * _part_dim(problem)), 2)
    dims = tile_dim(problem) + round_up(copied_dims(problem)[1], 64) * (problem.value_columns is None)
    if problem.quantised:
        few = widens_in_registers(problem, rows)
        return max((FEW_NARROW_BYTES if few else NARROW_BYTES) // (keys * dims) & -_stage_step(problem, rows), 2)
    return max(STAGE_BYTES // (keys * dims * ITEMSIZE), 2)


def candidates(problem: Problem, target: Target):
    """Hints for the tuner to try: around the defaults, those that fit."""
    wide, _ = joined_heads(problem, target)
    for keys in (BLOCK_KEYS, 2 * BLOCK_KEYS):
        rows = _block_rows(wide, None)
        default = default_stages(wide, keys, rows)
        step = _stage_step(wide, rows)
        for stages in (default,) if _by_pair(wide, rows) else (default, default + step, max(default - step, 2)):
            hints = FwdParams(block_size_keys=keys, num_stages=stages)
            try:
                resolve(dataclasses.replace(problem, fwd_params=hints), target)
            except ValueError:
                continue
            yield hints


def does_not_fit(problem: Problem, target: Target) -> str | None:
    """Why not even the smallest tiles fit, or None."""
    if is_wide(problem) and not is_direct(problem):
        return (
            f"it takes values in the key's rows, and head dimensions above {WIDE}, where 64 divides the head dimensions, the "
            "number of columns of a row and the first column of the value, and 8 divides the number of rows"
        )
    if is_wide(problem) and problem.quantised and problem.value_columns is None:
        return f"of quantised caches it takes head dimensions above {WIDE_IN_REGISTERS} where the value lies in the key's rows"
    if problem.quantised and not takes_many(problem):
        return (
            f"it widens quantised caches where 64 divides the head dimensions, or {LEAST_COLUMNS} divides one below {OPERAND_DIM}, "
            "8 the rows (of all sequences together), and no junk lies between tokens"
        )
    least = least_rows(problem)
    needs = lambda problem: _bytes(problem, BLOCK_KEYS, least, _stage_step(problem, least), target)
    if needs(problem) <= shared_memory(target):
        return None
    if needs(dataclasses.replace(problem, batch=1)) <= shared_memory(target):
        return f"its table of {problem.batch} sequences takes more shared memory than there is"
    return f"tiles of {problem.head_dim} and {problem.value_dim} dimensions take more shared memory than there is"


def _block_rows(problem: Problem, wanted: int | None) -> int:
    """Query rows of a block."""
    there = problem.num_tokens * problem.group
    if widens_in_registers(problem, min(wanted or there, there)):
        most = FEW if max(problem.head_dim, problem.value_dim) <= WIDE else WIDE_FEW
        return round_up(min(wanted or there, there, most), 8)
    if is_wide(problem):
        most, few = (64, wide_few(problem)) if takes_many(problem) and not problem.quantised else (FEW, FEW)
        wanted = min(wanted or there, most)
        return round_up(wanted, 8) if wanted <= few else 64
    if problem.quantised:
        return min(round_up(min(wanted or there, there), 64), max(WIDENING_REGISTERS) * 64)
    if not takes_many(problem):
        return round_up(min(wanted or MOST_FEW, there, MOST_FEW), 8)
    few = FEW_OF_16_BITS if max(problem.head_dim, problem.value_dim) <= OPERAND_DIM else FEW
    if min(wanted or there, there) <= few:
        return round_up(min(wanted or there, there), 8)
    blocks = -(-there // 64)
    return min(round_up(wanted, 64), 64 * blocks, MANY[2]) if wanted else MANY[min(blocks, len(MANY)) - 1]


def widens_in_registers(problem: Problem, rows: int) -> bool:
    """Whether tiles of 8 bits are widened in registers, for blocks of `rows` query rows."""
    whole = all(dim % OPERAND_DIM == 0 for dim in copied_dims(problem))
    few = rows <= FEW or max(problem.head_dim, problem.value_dim) > WIDE
    return problem.quantised and not is_wide(problem) and whole and few


def _stage_step(problem: Problem, rows: int) -> int:
    """What divides the number of stages. A stage is always that of the same warpgroup, which counts the phases of its barriers."""
    return TAKERS if widens_in_registers(problem, rows) else 1


def wide_few(problem: Problem) -> int:
    """Query rows of wide tiles that are columns of the products, at most."""
    return WIDE_FEW if most_bytes(problem) >= MUCH_WIDE else FEW


def _block_keys(problem: Problem, rows: int) -> int:
    """Keys of a tile."""
    if is_wide(problem):
        return MANY_KEYS if rows == 64 else BLOCK_KEYS
    if widens_in_registers(problem, rows):
        return MANY_KEYS if copied_dims(problem) == (OPERAND_DIM, OPERAND_DIM) else BLOCK_KEYS
    blocks = rows >= 128 and problem.num_tokens * problem.group > MANY[2]
    return MANY_KEYS if blocks and problem.head_dim <= 128 and not problem.quantised else BLOCK_KEYS


def takes_many(problem: Problem) -> bool:
    """Whether query rows can be the rows of the products: copies lay tiles out as products take them, and no rows lie between the
    ranges of tokens."""
    return is_direct(problem) and _common_dim(problem) == 64 and not problem.junk_between_tokens


def is_direct(problem: Problem) -> bool:
    """Whether copies lay tiles out as products want them: lines of at least `LEAST_COLUMNS` columns, eight rows at once."""
    least = 64 if is_wide(problem) or problem.quantised else LEAST_COLUMNS
    return _common_dim(problem) % least == 0 and (problem.seq_len % 8 == 0 or _end_to_end(problem))


def _end_to_end(problem: Problem) -> bool:
    """Whether 8 divides the rows of all sequences together, but not those of one. Tiles of a sequence then begin at rows that
    depend on its place in the batch. If `num_key_splits` is given, bits must not depend on that place."""
    rows = problem.batch * problem.seq_len
    numbers = rows * problem.num_kv_heads if problem.quantised else rows  # of scales or rows, which are int32
    whole = problem.seq_len % 8 != 0 and rows % 8 == 0 and numbers < 1 << 31
    return whole and not (problem.paged or problem.fwd_params.num_key_splits)


def _common_dim(problem: Problem) -> int:
    """The largest number of columns, up to 64, that divides what copies take, columns of a row, and the first one of the value."""
    if not is_wide(problem):
        return math.gcd(*copied_dims(problem), 64)
    first, _ = problem.value_columns or (0, 0)
    return math.gcd(problem.head_dim, problem.value_dim, problem.row_dim, first, 64)


def copied_dims(problem: Problem) -> tuple[int, int]:
    """Head dimensions of key and value as copies lay them out.

    A row of 8 bits with fewer than `OPERAND_DIM` columns is copied as one line. A line has `OPERAND_DIM` columns where this lets
    registers widen tiles, and else a multiple of 64. The same holds for the last line of a row where a head dimension is above
    `WIDE`. The copy fills the rest of the line with zeros, and does not read them.
    """
    key, value = problem.head_dim, problem.value_dim
    beyond = max(key, value) > WIDE

    def copied(dim, line):
        filled_up = dim % LEAST_COLUMNS == 0 if dim < OPERAND_DIM else beyond and dim % 64 == 0
        return round_up(dim, line) if filled_up and problem.quantised and not is_wide(problem) else dim

    for_registers = copied(key, OPERAND_DIM), copied(value, OPERAND_DIM)
    few = (problem.num_tokens * problem.group <= FEW or beyond) and all(dim % OPERAND_DIM == 0 for dim in for_registers)
    return for_registers if few else (copied(key, 64), copied(value, 64))


def is_wide(problem: Problem) -> bool:
    """Whether a tile may be too wide for one warpgroup, or its keys have to wait for its values."""
    most = WIDE_IN_REGISTERS if problem.quantised else WIDE
    return problem.value_columns is not None or max(problem.head_dim, problem.value_dim) > most


def _narrow_line(problem: Problem) -> int:
    """Bytes of a line of a tile of 8 bits that is widened in registers. Lines divide rows that are longer than one line."""
    return math.gcd(OPERAND_DIM, *(dim for dim in (problem.head_dim, problem.value_dim) if dim > OPERAND_DIM))


def _by_pair(problem: Problem, rows: int) -> bool:
    """Whether a pair of warpgroups multiplies, for blocks of `rows` query rows."""
    return is_wide(problem) and rows == 64


def tile_dim(problem: Problem) -> int:
    """Columns of a tile of the key's rows."""
    _, end = problem.value_columns or (0, 0)
    return round_up(max(copied_dims(problem)[0], end), 64)


def _part_dim(problem: Problem) -> int:
    """Columns of a part of a tile of keys."""
    dim = tile_dim(problem)
    if not problem.quantised or not is_wide(problem):
        return dim
    # Products want lines of `line` columns, and copies take whole lines of the cache's rows.
    line = functools.partial(math.gcd, 128)
    return next(part for part in PARTS if dim % part == 0 and problem.row_dim % line(part) == 0)


def cannot_copy(problem: Problem) -> str | None:
    """Why pages cannot be copied into tiles, or None."""
    if not problem.paged:
        return None
    least = LEAST_SCALES if problem.quantised else 8
    if _part_rows(problem, BLOCK_KEYS) % least:
        what = f"of a quantised cache, whose scales it copies {least} at once" if problem.quantised else "of a page"
        return f"a copy takes {least} rows {what}, which do not divide pages of {problem.page_size}"
    if is_direct(problem) or is_wide(problem) or problem.quantised:  # `does_not_fit` knows what wide rows and 8 bits need
        return None
    return f"its pages have head dimensions that {LEAST_COLUMNS} divides, not {problem.head_dim} and {problem.value_dim}"


def _part_rows(problem: Problem, keys: int) -> int:
    """Number of rows of a tile that one copy takes.

    For a cache in pages this is a quarter of a tile at most, so that few rows beyond a range are read. For a cache with scales it
    is at least the rows of one copy of scales.
    """
    most = max(keys // 4, LEAST_SCALES) if problem.quantised else keys // 4
    return math.gcd(problem.page_size, most) if problem.page_size else keys


def tiles(problem: Problem, target: Target) -> Tiles:
    """The shape of the work for a problem whose hints are resolved."""
    (wide, heads), hints = joined_heads(problem, target), problem.fwd_params
    return _tiles(wide, hints.block_size_keys, hints.block_size_heads, hints.num_stages, target, heads)


def _tiles(problem, keys, rows, stages, target, heads) -> Tiles:
    row_blocks = -(-problem.num_tokens * problem.group // rows)
    many = rows % 64 == 0 and takes_many(problem)
    in_registers = widens_in_registers(problem, rows)
    pair = many and is_wide(problem)
    long = pair or (many and problem.quantised)
    change = CHANGE_OF_LONG if long else CHANGE if many or in_registers else 0
    schedule = Schedule.of(problem, multiprocessors(target) // (problem.num_kv_heads * row_blocks), keys, change)
    alone = schedule.by_sequence or problem.batch == 1
    own_dim = problem.head_dim // heads
    in_whole_lines = problem.num_kv_heads * problem.head_dim % OPERAND_DIM == 0
    shares_lines = heads > 1 and problem.head_dim % OPERAND_DIM != 0 and in_whole_lines
    key_dim, value_dim = (round_up(dim, 64) for dim in copied_dims(problem))
    # Output is written by way of the query's place in shared memory, line by line.
    staged = problem.value_dim <= problem.head_dim if pair else problem.value_dim == problem.head_dim == key_dim
    there = problem.num_tokens * problem.group
    if (many or in_registers) and problem.group % 8 == 0:
        tokens, token_rows = problem.num_tokens, problem.group
    else:  # up to 8 are one tile, which may be larger than what there is
        tokens, token_rows = 1, round_up(there, 8) if many or there > 8 else there
    wide_stages = WIDE_STAGES if problem.quantised and not in_registers else 0
    if wide_stages and not many:  # parts of one tile, and those that are widened meanwhile
        wide_stages = tile_dim(problem) // _part_dim(problem) + 2
    plan = Tiles(
        many=many,
        pair=pair,
        tokens=tokens,
        token_rows=token_rows,
        block_rows=rows,
        row_blocks=row_blocks,
        warpgroups=TAKERS if in_registers else 2 if pair else rows // 64 if many else 1,
        takes_turns=many and (rows, problem.head_dim) == TURNS and row_blocks == 1 and not problem.quantised,
        query_slots=2,
        terms=MOST_TERMS if problem.keeps_accum_dtype else 1,
        writes_out=many and staged and not problem.keeps_accum_dtype,
        block_dim=key_dim,
        value_dim=value_dim,
        query_dim=own_dim if in_registers and own_dim <= WIDE else key_dim,  # a copy takes no more columns
        tile_dim=tile_dim(problem),
        value_start=None if problem.value_columns is None else problem.value_columns[0],
        paged=problem.paged,
        waits_for_pages=many and problem.paged and not (has_fast_memory(target) and problem.page_size <= EARLY_PAGE),
        part_rows=_part_rows(problem, keys) if problem.paged or not pair else keys // 2,
        stages=stages,
        wide_stages=wide_stages,
        joined=heads,
        shares_lines=shares_lines,
        in_registers=in_registers,
        narrow_line=OPERAND_DIM if shares_lines else _narrow_line(problem),
        part_dim=_part_dim(problem),
        direct=is_direct(problem),
        end_to_end=is_direct(problem) and _end_to_end(problem),
        common_dim=_common_dim(problem) if is_direct(problem) else 64,
        table=0 if alone else max(round_up(problem.batch, 8), BLOCK_SEQUENCES),
        table_step=1 if alone or not pair else step_of_table(problem.batch),
        schedule=schedule,
    )
    if (many or wide_stages or in_registers) and plan.shared_bytes() > shared_memory(target):
        return dataclasses.replace(plan, query_slots=1)
    return plan


def step_of_table(batch: int) -> int:
    """Sequences per entry of the table of a pair, whose tiles leave room for MOST_ENTRIES."""
    fits = (step for step in (1, 2, 4) if table_entries(round_up(batch, 8), step) <= MOST_ENTRIES)
    return next(fits, 8)


def launches_early(target: Target) -> bool:
    """Whether the second kernel is launched when the programs of the first one have begun, and not when they have ended. As
    measured, an early launch is slower on an H200. On an H100 it was faster than a late launch that left a gap. One without a gap
    has not been timed there."""
    return not has_fast_memory(target)


def merging(problem: Problem, target: Target, plan: Tiles) -> tuple[tuple[int, int], int, int]:
    """How the second kernel merges: query rows and dimensions of a part, parts that a program merges at once, and programs.

    The query rows of a part are those of one token. A program has as few query rows at once as let all programs run at once.
    """
    group, rows = (plan.token_rows, plan.num_rows) if plan.many else (problem.group, problem.num_tokens * problem.group)
    dims = math.gcd(plan.value_dim, MERGE_DIMS)
    if problem.value_dim % dims or (dims < MERGE_DIMS and group % 2):  # a part has as many numbers as there are threads, at least
        dims = round_up(problem.value_dim, MERGE_DIMS)
    least = -(-MERGE_DIMS // dims)
    most = min(max(MERGE_NUMBERS // (dims * plan.merge_slots), least), MERGE_PARTS * math.gcd(group, MERGE_ROWS[-1]))
    fits = [n for n in MERGE_ROWS if problem.num_kv_heads * rows % n == 0 and least <= n <= most]
    work = problem.batch * problem.num_kv_heads * rows * -(-problem.value_dim // dims)
    programs = MERGE_PROGRAMS * multiprocessors(target)
    at_once = next((n for n in fits if work // n <= programs), fits[-1])
    part = math.gcd(at_once, group)
    return (part, dims), at_once // part, min(work // at_once, programs)


def _bytes(problem, keys, rows, stages, target, heads=1) -> int:
    return _tiles(problem, keys, rows, stages, target, heads).shared_bytes()


def shared_memory(target) -> int:
    """Bytes of shared memory that one program may have."""
    return getattr(target.device, "shared_memory_per_block_optin", SHARED_MEMORY)
