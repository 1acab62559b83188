"""Sizes of blocks, tiles and rings: the defaults with their reasons, the checks of hints, and what does not fit."""

import dataclasses
import math

from ejk_ragged import FwdParams, Problem, Target
from ejk_ragged_schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The static shape of the work.

    Attributes:
        many: whether query rows are the rows of the products, 64 per warpgroup, or their columns.
        pair: whether two warpgroups share 64 query rows, and each has half of the columns of the output.
        tokens: tokens of the query as kernels see it, T: the problem's, or 1 where all query rows are laid end to end.
        token_rows: query rows per token and kv head, G.
        block_rows: query rows of one kv head in a program: a multiple of 8, or of 64 where they are many.
        row_blocks: such blocks per kv head.
        warpgroups: warpgroups that multiply, each for an equal part of the block or, in a pair, for the same query rows.
        query_slots: blocks of query rows that a program holds: the block of this piece, and, if there is room, of the next piece.
        terms: a weight is written as the sum of so many numbers of 16 bits.
        writes_out: whether the first kernel writes the output of sequences that are one piece.
        block_dim, value_dim: head dimensions of key and value, padded to a multiple of 64.
        tile_dim: columns of the key's rows that are copied: those of the key and, if they are there, those of the value.
        value_start: the first column of the value in the key's rows, or None.
        paged: whether the cache is a pool of pages.
        part_rows: rows of a tile that one copy takes: all, or those that lie in one page.
        stages: places for tiles of keys that a program holds as they are copied, and for tiles of values. In a pair, a tile has
            two places, one per half.
        wide_stages: the same for widened tiles of a cache of 8 bits; 0 for other caches.
        direct: whether copies lay a tile out as products want it. For this, 8 must divide the rows and 64 the head dimensions.
            Other tiles are copied as they are, and a warpgroup lays them out.
        table: size of the table of sequences that each program makes. 0 if each program works on one sequence only.
        schedule: who works on which rows.
    """

    many: bool
    pair: bool
    tokens: int
    token_rows: int
    block_rows: int
    row_blocks: int
    warpgroups: int
    query_slots: int
    terms: int
    writes_out: bool
    block_dim: int
    value_dim: int
    tile_dim: int
    value_start: int | None
    paged: bool
    part_rows: int
    stages: int
    wide_stages: int
    direct: bool
    table: int
    schedule: Schedule

    @property
    def row_groups(self) -> int:
        """Parts of a block of query rows: one per warpgroup, or one for a pair."""
        return 1 if self.pair else self.warpgroups

    @property
    def warpgroup_rows(self) -> int:
        """Query rows of one warpgroup."""
        return self.block_rows // self.row_groups

    @property
    def halves(self) -> int:
        """Places in shared memory per tile."""
        return 2 if self.pair else 1

    @property
    def place_rows(self) -> int:
        """Rows of a place in shared memory."""
        return self.schedule.block_keys // self.halves

    @property
    def swizzle(self) -> int:
        """Bytes of a line of the tiles that products want, at most."""
        return 64 if self.pair else 128

    @property
    def columns(self) -> dict[str, int]:
        """Columns of the tiles of each ring: "k", and "v" if values are in an array of their own."""
        return {"k": self.tile_dim} | ({"v": self.value_dim} if self.value_start is None else {})

    @property
    def num_rows(self) -> int:
        """Query rows of a kv head."""
        return self.tokens * self.token_rows

    @property
    def copy_rows(self) -> int:
        """Query rows that one copy takes: they lie together in memory, and are a whole number of the products' tiles."""
        return math.gcd(self.token_rows, 64) if self.many else self.block_rows

    def output(self, problem: Problem) -> dict[str, tuple]:
        """Shapes and dtypes of output and lse, where query rows are many."""
        out = problem.batch, self.tokens, problem.num_kv_heads, self.token_rows, self.value_dim
        lse = problem.batch, problem.num_kv_heads, self.row_blocks * self.block_rows
        return {"out": (out, problem.out_dtype), "lse": (lse, "float32")}

    @property
    def places(self) -> dict[str, int]:
        """Places of each ring in shared memory."""
        narrow = {f"narrow_{name}": self.stages for name in self.columns} if self.wide_stages else {}
        return {"q": self.query_slots, **dict.fromkeys(self.columns, self.wide_stages or self.stages), **narrow}

    @property
    def registers(self) -> tuple[int, ...]:
        """Registers of a thread that multiplies, of one that widens, if any does, and of one that copies; empty: as the compiler
        likes."""
        if not self.many:
            return ()
        if self.pair:
            return PAIR_REGISTERS
        return (WIDENING_REGISTERS if self.wide_stages else REGISTERS)[self.warpgroups]

    @property
    def align(self) -> int:
        """The first row of a tile is a multiple of this number."""
        return self.part_rows if self.paged else 8 if self.direct else 1

    @property
    def stored_dim(self) -> int:
        """Columns of partial results. A warpgroup of 128 threads reads one query row at a time."""
        return round_up(self.value_dim, 128)

    @property
    def merge_slots(self) -> int:
        """Partial results of a query row that are read at once: about as many as there are."""
        each = -(-self.schedule.slots // self.schedule.batch)
        return min(max(1 << (each - 1).bit_length(), LEAST_MERGED), 16)

    @property
    def reduction_bytes(self) -> int:
        """Shared memory in which a sum or maximum over keys passes between warps, all query rows at once."""
        return 0 if self.pair else 2048 if self.many else 128 * self.block_rows

    def shared_bytes(self) -> int:
        """Bytes of shared memory that a program needs, each array beginning at a multiple of 1024."""
        keys, rows, dim = self.place_rows, self.block_rows, self.block_dim
        tiles = keys * sum(self.columns.values()) * ITEMSIZE
        narrow = [tiles // ITEMSIZE * self.stages, *[keys * 4 * places for places in (self.stages, self.wide_stages) * 2]]
        weights = 2 * self.terms if self.pair else 0 if self.many else MOST_TERMS
        arrays = narrow if self.wide_stages else []
        arrays += [
            tiles * (self.wide_stages or self.stages),
            tiles * (not self.direct),
            self.query_slots * rows * dim * ITEMSIZE,
            weights * rows * keys * ITEMSIZE,
            2 * 2 * rows * 4 * self.pair,
        ]
        arrays += [self.reduction_bytes, BARRIERS, self.table * 4]
        return sum(round_up(size, 1024) for size in arrays)


# The defaults, as measured on an H100. docs/developers has the log.

# Query rows per block. Up to FEW query rows are columns of the products, or up to MOST_FEW if they cannot be rows. More are rows of
# the products: MANY has the size of a block for 1, 2, 3, and 4 or more times 64 query rows. Each block reads the cache again.
FEW, MOST_FEW, MANY = 32, 64, (64, 128, 192, 128)
BLOCK_KEYS = 64  # keys per tile: what the tensor cores take at once
MANY_KEYS = 128  # keys per tile with several blocks: the tensor cores set the pace then, and read the query half as often
STAGE_BYTES = 64 * 1024  # of tiles that are on their way or worked on; more tiles would wait for each other
NARROW_BYTES = 48 * 1024  # the same for tiles of 8 bits
PAIR_STAGES = 3  # halves of tiles per pair
WIDE_STAGES = 3  # widened tiles per program: with 2, the warpgroups that multiply wait more often
LEAST_SCALES = 32  # per copy of scales: 128 bytes, the least that a copy takes
# Registers per thread that multiplies, that widens, and that copies, by the number of warpgroups that multiply: as many as a
# multiprocessor has.
REGISTERS = {1: (232, 40), 2: (232, 40), 3: (160, 32)}
PAIR_REGISTERS = 240, 24
WIDENING_REGISTERS = {1: (240, 152, 40), 2: (176, 112, 40)}
# The second kernel.
MERGE_ROWS = 4  # query rows that a program merges at once, if query rows are few, and that leaves one program per multiprocessor
MERGE_DIMS, FEW_MERGE_DIMS = 64, 16  # dimensions that a program merges at once, if query rows are many
LEAST_MERGED = 4  # partial results of a query row that a program reads at once, at least
MERGE_PROGRAMS = 4  # programs per multiprocessor: as many as find room next to one of the first kernel
BLOCK_SEQUENCES = 64  # sequences that a program sums up at once for its table

# Who is asked first: these kernels are faster than those of pallas_triton from LEADING_ROWS query rows per kv head on, unless no
# more than SHORT rows of a sequence are seen, or a full cache has fewer than MUCH bytes. Where the value lies in wide rows of the
# key, these kernels are faster from FEW query rows on.
LEADING_ROWS, SHORT, MUCH = 64, 256, 64 << 20

WIDE = 256  # head dimensions of one warpgroup, at most

# A weight is written as the sum of up to MOST_TERMS numbers of 16 bits. There is always room for them, so that hints which fit a
# call also fit its gradients.
MOST_TERMS = 2
ITEMSIZE = 2
BARRIERS = 1024  # bytes
# An H100, for lowering without a device.
MULTIPROCESSORS = 132
SHARED_MEMORY = 227 * 1024


def resolve(problem: Problem, target: Target) -> FwdParams:
    """The hints of `problem`, checked, with defaults in the gaps. Sizes are rounded up to what the tensor cores and the form take.

    Raises:
        ValueError: a hint cannot work, naming the field.
    """
    given = problem.fwd_params
    rows = _block_rows(problem, given.block_size_heads)
    keys = round_up(given.block_size_keys or _block_keys(problem, rows), 64)
    if given.block_size_heads is None:
        while rows > least_rows(problem) and _bytes(problem, keys, rows, given.num_stages or 2, target) > shared_memory(target):
            rows = rows - 64 if rows > 64 else max(rows // 16 * 8, 8)
    least = 2 if is_wide(problem) and rows == 64 else 1  # a pair works on both halves of a tile at once
    stages = max(given.num_stages or default_stages(problem, keys, rows), least)
    # The gradients of a call keep two terms per weight, and get the hints of the call.
    may_have_fewer = not given.num_stages or problem.keeps_accum_dtype
    while may_have_fewer and stages > least and _bytes(problem, keys, rows, stages, target) > shared_memory(target):
        stages -= 1
    needs = _bytes(problem, keys, rows, stages, target)
    if needs > shared_memory(target):
        raise ValueError(
            f"FwdParams.block_size_keys {keys}, block_size_heads {rows} and num_stages {stages} need {needs} bytes of shared "
            f"memory for {problem}; a program of mosaic_gpu has {shared_memory(target)} on this device. Give smaller ones."
        )
    return dataclasses.replace(given, block_size_heads=rows, block_size_keys=keys, num_stages=stages)


def least_rows(problem: Problem) -> int:
    """Query rows of the smallest block. Only query rows that are rows of the products meet widened tiles."""
    return 64 if problem.quantised else 8


def default_stages(problem: Problem, keys: int, rows: int) -> int:
    """Stages of about `STAGE_BYTES`: two at least, so that keys are on their way while values are worked on."""
    if is_wide(problem) and rows == 64:
        return PAIR_STAGES
    dims = _tile_dim(problem) + round_up(problem.value_dim, 64) * (problem.value_columns is None)
    if problem.quantised:
        return max(NARROW_BYTES // (keys * dims), 2)
    return max(STAGE_BYTES // (keys * dims * ITEMSIZE), 2)


def candidates(problem: Problem, target: Target):
    """Hints for the tuner to try: around the defaults, those that fit."""
    for keys in (BLOCK_KEYS, 2 * BLOCK_KEYS):
        default = default_stages(problem, keys, _block_rows(problem, None))
        for stages in (default, default + 1, max(default - 1, 2)):
            hints = FwdParams(block_size_keys=keys, num_stages=stages)
            try:
                resolve(dataclasses.replace(problem, fwd_params=hints), target)
            except ValueError:
                continue
            yield hints


def leads(problem: Problem, target: Target) -> str:
    """Why these kernels are faster than those of `pallas_triton`, as measured on an H100, or ""."""
    capability = getattr(target.device, "compute_capability", None)
    if capability is None or not all(isinstance(n, int) for n in problem.sizes) or problem.keeps_accum_dtype:
        return ""
    rows, takes_many = problem.num_tokens * problem.group, _takes_many(problem)
    if is_wide(problem):
        latent = problem.value_columns is not None and _tile_dim(problem) > WIDE
        return f"more than {FEW} query rows, and values in wide rows of the key" if latent and takes_many and rows > FEW else ""
    keys = problem.seq_len if problem.most_keys is None else min(problem.seq_len, problem.most_keys)
    row_bytes = (problem.head_dim + problem.value_dim) * problem.num_kv_heads * problem.cache_dtype.itemsize
    much = keys > SHORT and problem.batch * keys * row_bytes >= MUCH
    if rows >= LEADING_ROWS and takes_many and much and (not problem.quantised or problem.head_dim == 128):
        return f"{LEADING_ROWS} or more query rows per kv head"
    if problem.paged and problem.batch == problem.num_tokens == 1 and not problem.quantised:
        return "pages of a single sequence"
    return ""


def does_not_fit(problem: Problem, target: Target) -> str | None:
    """Why not even the smallest tiles fit, or None."""
    if is_wide(problem) and (problem.quantised or not _direct(problem)):
        return (
            f"it takes values in the key's rows, and head dimensions above {WIDE}, in caches of 16 bits where 64 divides the head "
            "dimensions and the first column of the value, and 8 divides the rows"
        )
    if problem.quantised and not _takes_many(problem):
        return "it widens quantised caches where 64 divides the head dimensions, 8 the rows, and no junk lies between tokens"
    needs = lambda problem: _bytes(problem, BLOCK_KEYS, least_rows(problem), 1, target)
    if needs(problem) <= shared_memory(target):
        return None
    if needs(dataclasses.replace(problem, batch=1)) <= shared_memory(target):
        return f"its table of {problem.batch} sequences takes more shared memory than there is"
    return f"tiles of {problem.head_dim} and {problem.value_dim} dimensions take more shared memory than there is"


def _block_rows(problem: Problem, wanted: int | None) -> int:
    """Query rows of a block."""
    there = problem.num_tokens * problem.group
    if is_wide(problem):
        most = 64 if _takes_many(problem) else FEW
        wanted = min(wanted or there, most)
        return round_up(wanted, 8) if wanted <= FEW else 64
    if problem.quantised:
        return min(round_up(min(wanted or there, there), 64), max(WIDENING_REGISTERS) * 64)
    if not _takes_many(problem):
        return round_up(min(wanted or MOST_FEW, there, MOST_FEW), 8)
    if min(wanted or there, there) <= FEW:
        return round_up(min(wanted or there, there), 8)
    blocks = -(-there // 64)
    return min(round_up(wanted, 64), 64 * blocks, MANY[2]) if wanted else MANY[min(blocks, len(MANY)) - 1]


def _block_keys(problem: Problem, rows: int) -> int:
    """Keys of a tile."""
    blocks = rows >= 128 and problem.num_tokens * problem.group > MANY[2]
    return MANY_KEYS if blocks and problem.head_dim <= 128 and not problem.quantised else BLOCK_KEYS


def _takes_many(problem: Problem) -> bool:
    """Whether query rows can be the rows of the products: copies lay tiles out as products want them, and each query row sees
    whatever the others see of a tile of values."""
    return _direct(problem) and not problem.junk_between_tokens


def _direct(problem: Problem) -> bool:
    first, _ = problem.value_columns or (0, 0)
    dims = problem.head_dim, problem.value_dim, first
    return problem.seq_len % 8 == 0 and problem.row_dim % 8 == 0 and not any(dim % 64 for dim in dims)


def is_wide(problem: Problem) -> bool:
    """Whether a tile may be too wide for one warpgroup, or its keys have to wait for its values."""
    return problem.value_columns is not None or max(problem.head_dim, problem.value_dim) > WIDE


def _tile_dim(problem: Problem) -> int:
    """Columns of the key's rows that are copied."""
    _, end = problem.value_columns or (0, 0)
    return round_up(max(problem.head_dim, end), 64)


def cannot_copy(problem: Problem) -> str | None:
    """Why pages cannot be copied into tiles, or None."""
    if not problem.paged:
        return None
    least = LEAST_SCALES if problem.quantised else 8
    if _part_rows(problem, BLOCK_KEYS) % least:
        what = f"of a quantised cache, whose scales it copies {least} at once" if problem.quantised else "of a page"
        return f"a copy takes {least} rows {what}, which do not divide pages of {problem.page_size}"
    return (
        None
        if _direct(problem)
        else f"its pages have head dimensions that 64 divides, not {problem.head_dim} and {problem.value_dim}"
    )


def _part_rows(problem: Problem, keys: int) -> int:
    """Rows of a tile that one copy takes. Of pages, a quarter of a tile at most, so that few rows beyond a range are read, or
    what has scales enough for a copy."""
    most = max(keys // 4, LEAST_SCALES) if problem.quantised else keys // 4
    return math.gcd(problem.page_size, most) if problem.page_size else keys


def tiles(problem: Problem, target: Target) -> Tiles:
    """The shape of the work for a problem whose hints are resolved."""
    hints = problem.fwd_params
    return _tiles(problem, hints.block_size_keys, hints.block_size_heads, hints.num_stages, target)


def _tiles(problem, keys, rows, stages, target) -> Tiles:
    row_blocks = -(-problem.num_tokens * problem.group // rows)
    schedule = Schedule.of(problem, _multiprocessors(target) // (problem.num_kv_heads * row_blocks), keys)
    alone = schedule.by_sequence or problem.batch == 1
    many = rows % 64 == 0 and _takes_many(problem)
    pair = many and is_wide(problem)
    # Output is written by way of the query's place in shared memory.
    staged = problem.value_dim <= problem.head_dim if pair else problem.value_dim == problem.head_dim
    there = problem.num_tokens * problem.group
    if many and problem.group % 8 == 0:
        tokens, token_rows = problem.num_tokens, problem.group
    else:  # up to 8 are one tile, which may be larger than what there is
        tokens, token_rows = 1, round_up(there, 8) if many or there > 8 else there
    plan = Tiles(
        many=many,
        pair=pair,
        tokens=tokens,
        token_rows=token_rows,
        block_rows=rows,
        row_blocks=row_blocks,
        warpgroups=2 if pair else rows // 64 if many else 1,
        query_slots=2,
        terms=MOST_TERMS if problem.keeps_accum_dtype else 1,
        writes_out=many and staged and not problem.keeps_accum_dtype,
        block_dim=round_up(problem.head_dim, 64),
        value_dim=round_up(problem.value_dim, 64),
        tile_dim=_tile_dim(problem),
        value_start=None if problem.value_columns is None else problem.value_columns[0],
        paged=problem.paged,
        part_rows=_part_rows(problem, keys) if problem.paged or not pair else keys // 2,
        stages=stages,
        wide_stages=WIDE_STAGES if problem.quantised else 0,
        direct=_direct(problem),
        table=0 if alone else round_up(problem.batch, 8) + BLOCK_SEQUENCES - 8,  # where the last sum begins, and what it writes
        schedule=schedule,
    )
    if many and plan.shared_bytes() > shared_memory(target):
        return dataclasses.replace(plan, query_slots=1)
    return plan


def merging(target: Target, batch: int, rows: int) -> tuple[int, int]:
    """Of so many rows a sequence: how many a program of the second kernel merges at once, and how many programs there are."""
    programs = MERGE_PROGRAMS * _multiprocessors(target)
    at_once = math.gcd(rows, MERGE_ROWS)
    while at_once > 1 and batch * rows // at_once < _multiprocessors(target):
        at_once //= 2
    return at_once, min(batch * rows // at_once, programs)


def merging_blocks(target: Target, plan: Tiles, blocks: int) -> tuple[int, int]:
    """Of so many blocks of 64 query rows: how many dimensions a program of the second kernel merges at once, and how many partial
    results. Where blocks are few, the dimensions are shared by more programs."""
    few = 2 * blocks * plan.value_dim // MERGE_DIMS < _multiprocessors(target)
    return (FEW_MERGE_DIMS, plan.merge_slots) if few else (MERGE_DIMS, LEAST_MERGED)


def _bytes(problem, keys, rows, stages, target) -> int:
    return _tiles(problem, keys, rows, stages, target).shared_bytes()


def _multiprocessors(target) -> int:
    return getattr(target.device, "core_count", None) or MULTIPROCESSORS


def shared_memory(target) -> int:
    """Bytes of shared memory that one program may have."""
    return getattr(target.device, "shared_memory_per_block_optin", SHARED_MEMORY)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
