"""Sizes of tiles and how many are on their way: the defaults with their reasons, and the checks of hints."""

import dataclasses
import math

from ejk_ragged import FwdParams, Problem, Target
from ejk_ragged_schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The static shape of the work.

    Attributes:
        block_rows: rows of queries of one kv head in a program, a multiple of 8.
        row_blocks: such blocks a kv head.
        block_dim: head_dim, padded to a multiple of 64.
        stages: tiles of keys, and as many of values, that a program holds.
        direct: whether copies lay a tile out as products want it. It takes rows that divide by 8 and dimensions by 64; other tiles
            are copied as they are, and laid out by the program.
        table: size of the table of sequences that a program makes itself; 0 where it has to do with one only.
        schedule: who works on which keys.
    """

    block_rows: int
    row_blocks: int
    block_dim: int
    stages: int
    direct: bool
    table: int
    schedule: Schedule

    @property
    def align(self) -> int:
        """What the first row of a tile divides by."""
        return 8 if self.direct else 1

    @property
    def stored_dim(self) -> int:
        """Of partial results, of which a warpgroup of 128 threads reads one at a time."""
        return round_up(self.block_dim, 128)

    @property
    def merge_slots(self) -> int:
        """Partial results of a sequence that are read at once: about as many as there are."""
        each = -(-self.schedule.slots // self.schedule.batch)
        return min(max(1 << (each - 1).bit_length(), LEAST_MERGED), 16)

    @property
    def reduction_bytes(self) -> int:
        """Shared memory in which a sum or maximum over keys passes between warps, all rows at once."""
        return 128 * self.block_rows

    def shared_bytes(self) -> int:
        """Bytes of shared memory that a program needs, each array beginning at a multiple of 1024."""
        keys, rows, dim = self.schedule.block_keys, self.block_rows, self.block_dim
        tiles = 2 * keys * dim * ITEMSIZE
        arrays = [tiles * self.stages, tiles * (not self.direct), 2 * rows * dim * ITEMSIZE, MOST_TERMS * rows * keys * ITEMSIZE]
        arrays += [self.reduction_bytes, BARRIERS, self.table * 4]
        return sum(round_up(size, 1024) for size in arrays)


# The defaults, as measured on an H100; docs/developers has the log.
BLOCK_KEYS = 64  # what the tensor cores take at once
STAGE_BYTES = 64 * 1024  # of tiles of keys and values on their way or worked on; more of them wait for each other
MAX_ROWS = 64  # rows of queries from here on go into further blocks, each of which reads the cache again
# Of the second kernel: rows that a program merges at once, where that leaves one for each multiprocessor, partial results of a row
# that it reads at once at least, and programs of a multiprocessor, as many as find room beside one of the first kernel.
MERGE_ROWS, LEAST_MERGED, MERGE_PROGRAMS = 4, 4, 4
BLOCK_SEQUENCES = 64  # sequences that are summed up at once when a program makes its table

# Numbers of 16 bits that a weight is written as the sum of, at most. Room is kept for them, so that hints which fit a call fit its
# gradients too.
MOST_TERMS = 2
ITEMSIZE = 2
BARRIERS = 1024
# What there is to a device, where there is no device to ask: an H100.
MULTIPROCESSORS = 132
SHARED_MEMORY = 227 * 1024


def resolve(problem: Problem, target: Target) -> FwdParams:
    """The hints of `problem`, checked, with defaults in the gaps. Sizes are rounded up to what the tensor cores take.

    Raises:
        ValueError: a hint cannot work, naming the field.
    """
    given = problem.fwd_params
    keys = round_up(given.block_size_keys or BLOCK_KEYS, 64)
    rows = round_up(min(given.block_size_heads or MAX_ROWS, problem.num_tokens * problem.group, MAX_ROWS), 8)
    if given.block_size_heads is None:
        while rows > 8 and _bytes(problem, keys, rows, given.num_stages or 2) > shared_memory(target):
            rows = max(rows // 16 * 8, 8)
    stages = given.num_stages or default_stages(problem, keys)
    while not given.num_stages and stages > 1 and _bytes(problem, keys, rows, stages) > shared_memory(target):
        stages -= 1
    needs = _bytes(problem, keys, rows, stages)
    if needs > shared_memory(target):
        raise ValueError(
            f"FwdParams.block_size_keys {keys}, block_size_heads {rows} and num_stages {stages} need {needs} bytes of shared "
            f"memory for {problem}; a program of mosaic_gpu has {shared_memory(target)} on this device. Give smaller ones."
        )
    return dataclasses.replace(given, block_size_heads=rows, block_size_keys=keys, num_stages=stages)


def default_stages(problem: Problem, keys: int) -> int:
    """Stages of about `STAGE_BYTES`: two at least, so that keys are on their way while values are worked on."""
    return max(STAGE_BYTES // (2 * keys * round_up(problem.head_dim, 64) * ITEMSIZE), 2)


def candidates(problem: Problem, target: Target):
    """Hints for the tuner to try: around the defaults, those that fit."""
    for keys in (BLOCK_KEYS, 2 * BLOCK_KEYS):
        default = default_stages(problem, keys)
        for stages in (default, default + 1, max(default - 1, 2)):
            hints = FwdParams(block_size_keys=keys, num_stages=stages)
            try:
                resolve(dataclasses.replace(problem, fwd_params=hints), target)
            except ValueError:
                continue
            yield hints


def does_not_fit(problem: Problem, target: Target) -> str | None:
    """Why not even the smallest tiles fit, or None."""
    needs = _bytes(problem, BLOCK_KEYS, 8, 1)
    if needs > shared_memory(target):
        return f"its table of {problem.batch} sequences takes more shared memory than there is"
    return None


def tiles(problem: Problem, target: Target) -> Tiles:
    """The shape of the work for a problem whose hints are resolved."""
    hints = problem.fwd_params
    return _tiles(problem, hints.block_size_keys, hints.block_size_heads, hints.num_stages, _multiprocessors(target))


def _tiles(problem, keys, rows, stages, multiprocessors) -> Tiles:
    row_blocks = -(-problem.num_tokens * problem.group // rows)
    schedule = Schedule.of(problem, multiprocessors // (problem.num_kv_heads * row_blocks), keys)
    alone = schedule.by_sequence or problem.batch == 1
    return Tiles(
        block_rows=rows,
        row_blocks=row_blocks,
        block_dim=round_up(problem.head_dim, 64),
        stages=stages,
        direct=problem.seq_len % 8 == 0 and problem.head_dim % 64 == 0,
        table=0 if alone else round_up(problem.batch, 8) + BLOCK_SEQUENCES - 8,  # where the last sum begins, and what it writes
        schedule=schedule,
    )


def terms_of_weights(problem: Problem) -> int:
    """Numbers of 16 bits that a weight is written as the sum of: more than one where the result is not rounded either."""
    return MOST_TERMS if problem.keeps_accum_dtype else 1


def merging(target: Target, batch: int, rows: int) -> tuple[int, int]:
    """Of so many rows a sequence: how many a program of the second kernel merges at once, and how many programs there are."""
    programs = MERGE_PROGRAMS * _multiprocessors(target)
    at_once = math.gcd(rows, MERGE_ROWS)
    while at_once > 1 and batch * rows // at_once < _multiprocessors(target):
        at_once //= 2
    return at_once, min(batch * rows // at_once, programs)


def _bytes(problem, keys, rows, stages) -> int:
    return _tiles(problem, keys, rows, stages, MULTIPROCESSORS).shared_bytes()


def _multiprocessors(target) -> int:
    return getattr(target.device, "core_count", None) or MULTIPROCESSORS


def shared_memory(target) -> int:
    """Bytes of shared memory that one program may have."""
    return getattr(target.device, "shared_memory_per_block_optin", SHARED_MEMORY)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
