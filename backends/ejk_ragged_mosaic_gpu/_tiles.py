"""The static shape of the work: blocks of query rows, tiles, rings, registers, and the shared memory that they take."""

import dataclasses
import math
from typing import NamedTuple

from jax import lax

from ejk_ragged import Problem
from ejk_ragged_schedule import Schedule


# Registers per thread that multiplies, that widens, and that copies, by the number of warpgroups that multiply: as many as a
# multiprocessor has.
REGISTERS = {1: (232, 40), 2: (232, 40), 3: (160, 32)}
PAIR_REGISTERS = 240, 24
WIDENING_REGISTERS = {1: (240, 152, 40), 2: (176, 112, 40)}
# Partial results of a query row that a program merges at once, at least: where query rows are few (False), and many (True).
LEAST_MERGED = {False: 4, True: 2}
# A weight is written as the sum of up to MOST_TERMS numbers of 16 bits. There is always room for them, so that hints which fit a
# call also fit its gradients. A pair has tiles of fewer keys with MOST_TERMS terms.
MOST_TERMS = 2
ITEMSIZE = 2
BARRIERS = 1024  # bytes
OPERAND_DIM = 128  # divides the head dimensions of tiles that are widened in registers, as their layouts have it
# Scales that one copy takes, at least and at most, and what divides the number of the first one: a copy begins at a multiple of 16
# bytes, and takes a multiple of 128 bytes.
LEAST_SCALES, MOST_SCALES, SCALES_AT_ONCE = 32, 256, 4
BLOCK_SEQUENCES = 64  # sequences that a program sums up at once for its table


class Ring(NamedTuple):
    """What the places of a ring hold of a tile.

    Attributes:
        source: 0 for the cache's array of keys, 1 for its array of values.
        first, columns: the first column in that array, and the number of columns.
    """

    source: int
    first: int
    columns: int


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
        warpgroups: warpgroups that multiply, each for an equal part of the block. Those of a pair, and those that take tiles in
            turn, are for all of it.
        takes_turns: whether two warpgroups ask for their products in turn.
        query_slots: blocks of query rows that a program holds: the block of this piece, and, if there is room, of the next piece.
        terms: a weight is written as the sum of so many numbers of 16 bits.
        writes_out: whether the first kernel writes the output of sequences that are one piece.
        block_dim, value_dim: head dimensions of key and value as copies lay them out, padded to a multiple of 64.
        query_dim: head dimensions of the query as copies lay it out: `block_dim`, or those of one kv head where registers widen
            tiles.
        tile_dim: columns of a tile of the key's rows: those of the key and, if they are there, those of the value.
        value_start: the first column of the value in the key's rows, or None.
        paged: whether the cache is a pool of pages.
        waits_for_pages: whether the copying warpgroup waits for the entries of the page table where it looks them up, a tile early.
            Else it waits when their tile's turn comes.
        part_rows: rows of a tile that one copy takes: all, or those that lie in one page.
        stages: places for tiles of keys that a program holds as they are copied, and for tiles of values. A pair has one place per
            half of a tile. A tile of 8 bits has one place per part.
        wide_stages: the same for widened tiles, or parts of tiles, of a cache of 8 bits; 0 where no warpgroup of its own widens.
        joined: how many kv heads are one, see `_joined`.
        shares_lines: whether a joined kv head begins in the line of memory in which the one before ends. Tiles then begin where the
            line begins, and hold whole lines. For this, a row of the cache has to be whole lines.
        in_registers: whether the warpgroups that multiply take tiles of 8 bits in turn, and widen them in registers.
        narrow_line: bytes of a line of tiles that are widened in registers.
        part_dim: columns of a part of a tile. A tile is one part but for wide tiles of 8 bits, which have columns of several parts.
        direct: whether copies lay a tile out as products want it. For this, 8 must divide the rows, and 16 or 64 the columns that
            copies lay out. Other tiles are copied as they are, and a warpgroup lays them out.
        end_to_end: whether the rows of all sequences are copied as those of one, because 8 divides only the rows of all.
        common_dim: the largest number of columns, up to 64, that divides what copies take: lines have no more.
        table: sequences in the table that each program makes. 0 if each program works on one sequence only.
        table_step: sequences per entry of the table of the first kernel: 1, 2, 4 or 8.
        schedule: who works on which rows.
    """

    many: bool
    pair: bool
    tokens: int
    token_rows: int
    block_rows: int
    row_blocks: int
    warpgroups: int
    takes_turns: bool
    query_slots: int
    terms: int
    writes_out: bool
    block_dim: int
    value_dim: int
    query_dim: int
    tile_dim: int
    value_start: int | None
    paged: bool
    waits_for_pages: bool
    part_rows: int
    stages: int
    wide_stages: int
    joined: int
    shares_lines: bool
    in_registers: bool
    narrow_line: int
    part_dim: int
    direct: bool
    end_to_end: bool
    common_dim: int
    table: int
    table_step: int
    schedule: Schedule

    @property
    def row_groups(self) -> int:
        """Parts of a block of query rows: one per warpgroup, or one where each warpgroup has all of them."""
        return 1 if self.pair or self.in_registers else self.warpgroups

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
    def scales_copied(self) -> int:
        """Scales that are copied for the rows of a place. If rows lie end to end, the first may be those of rows before the place,
        because a copy begins at a multiple of 16 bytes."""
        return self.place_rows + (LEAST_SCALES if self.end_to_end else 0)

    @property
    def scale_copies(self) -> list[tuple[int, int]]:
        """The copies that take these scales, if rows lie end to end: the first scale of each copy, and their number."""
        return [(first, min(MOST_SCALES, self.scales_copied - first)) for first in range(0, self.scales_copied, MOST_SCALES)]

    @property
    def frees_early(self) -> bool:
        """Whether warpgroups that widen tiles in registers free a place as soon as its tile is in registers, before they compute
        weights. As measured on an H200, that is faster for joined kv heads whose warpgroups have one place each. With more places
        it is slower, and wide kv heads that are apart take as long."""
        return self.joined > 1 and self.stages == self.warpgroups

    @property
    def line(self) -> int:
        """Bytes of a line of the tiles that products want, at most. The columns of a line divide those of the value of a warpgroup,
        and products take as many rows of the value at once."""
        return math.gcd(self.place_rows, self.value_dim // self.halves, self.common_dim) * ITEMSIZE

    @property
    def rings(self) -> dict[str, Ring]:
        """The rings of tiles: "k", and "v" if values are in an array of their own. For a tile in several parts, "k" is the first
        part. A pair has a ring "v0", "v1" for the values of each warpgroup, and the others for what else keys have."""
        source, start = (1, 0) if self.value_start is None else (0, self.value_start)
        if not self.pair:
            return {"k": Ring(0, 0, self.part_dim)} | ({"v": Ring(1, 0, self.value_dim)} if source else {})
        size = self.value_dim // 2
        values = {f"v{i}": Ring(source, start + i * size, size) for i in range(2)}
        others = [(0, self.tile_dim)] if source else [(0, start), (start + self.value_dim, self.tile_dim)]
        return {f"k{i}": Ring(0, first, end - first) for i, (first, end) in enumerate(others) if first < end} | values

    def order(self, half: int) -> list[str]:
        """The rings in the order in which the places of a half of a tile are filled. In a pair, that is the order in which they are
        read and become free: the values of the warpgroup that computes the weights before those of the other."""
        return sorted(self.rings, key=lambda name: (name[0], name != f"v{half}"))

    def key_columns(self, name: str) -> int:
        """Columns of the key in the places of a ring."""
        source, first, columns = self.rings[name]
        return 0 if source else max(min(columns, self.block_dim - first), 0)

    def place(self, tile, half: int = 0, part: int = 0):
        """The place in the rings for a part of the tile with this number, or for a half: each half has a place of its own."""
        return half if self.pair else lax.rem(tile * self.parts + part, self.stages)

    @property
    def parts(self) -> int:
        """Places in shared memory per tile of keys, each with some of the columns."""
        return self.tile_dim // self.part_dim

    @property
    def value_parts(self) -> list[tuple[int, int] | None]:
        """For each part of a tile the value's columns in the part: the first one and their number, or None if there are none."""
        if self.value_start is None:
            return [(0, self.value_dim)]
        found = []
        for first in range(0, self.tile_dim, self.part_dim):
            start = max(self.value_start - first, 0)
            size = min(self.value_start + self.value_dim - first, self.part_dim) - start
            found.append((start, size) if size > 0 else None)
        return found

    @property
    def num_rows(self) -> int:
        """Query rows of a kv head."""
        return self.tokens * self.token_rows

    @property
    def copy_rows(self) -> int:
        """Query rows that one copy takes: they lie together in memory, and are a whole number of the products' tiles."""
        return math.gcd(self.token_rows, self.warpgroup_rows) if self.many or self.tokens > 1 else self.block_rows

    def output(self, problem: Problem) -> dict[str, tuple]:
        """Shapes and dtypes of output and lse."""
        tokens, rows = (self.tokens, self.token_rows) if self.many else (problem.num_tokens, problem.group)
        out = problem.batch, tokens, problem.num_kv_heads, rows, problem.value_dim
        lse = problem.batch, problem.num_kv_heads, self.row_blocks * self.block_rows if self.many else tokens * rows
        return {"out": (out, problem.out_dtype), "lse": (lse, "float32")}

    def value_dtype(self, problem: Problem):
        """Dtype of weights and values in products. Values of 8 bits are float16, so that their products with scales are rounded an
        eighth as much as in bfloat16, but for values in the key's rows, which are what keys are."""
        return "float16" if self.in_registers or (self.many and self.wide_stages) else problem.dtype

    def scales_with(self, ring: str) -> str:
        """Whose scales, of "k" and "v", are copied with the tiles of a ring. A warpgroup that only widens waits once for all."""
        return ring if self.in_registers else "kv" if self.wide_stages and ring == "k" else ""

    def is_freed(self, name: str) -> bool:
        """Whether the places of a ring have a barrier that says that they are free."""
        return name not in self.freed_with

    @property
    def scales_values(self) -> bool:
        """Whether scales by row multiply values of 8 bits. Else they multiply weights, which may have two terms."""
        return self.many and self.terms == 1

    @property
    def places(self) -> dict[str, int]:
        """Places of each ring in shared memory."""
        narrow = {f"narrow_{name}": self.stages for name in self.rings} if self.wide_stages else {}
        return {"q": self.query_slots, **dict.fromkeys(self.rings, self.wide_stages or self.stages), **narrow}

    @property
    def filled_with(self) -> dict[str, str]:
        """Rings whose places are filled together with those of another ring, which has the barrier."""
        return {"narrow_v": "narrow_k"} if self.widens_values else {}

    @property
    def freed_with(self) -> dict[str, str]:
        """Rings whose places are free together with those of another ring, which has the barrier."""
        return {"narrow_v": "narrow_k", "k": "v"} if self.widens_values else {}

    @property
    def widens_values(self) -> bool:
        """Whether tiles of values are widened, together with the tiles of their keys."""
        return bool(self.wide_stages) and self.value_start is None

    @property
    def registers(self) -> tuple[int, ...]:
        """Registers of a thread that multiplies, of one that widens, if any does, and of one that copies; empty: as the compiler
        likes."""
        if self.in_registers:
            return REGISTERS[self.warpgroups]
        if not self.many:
            return WIDENING_REGISTERS[1] if self.wide_stages else ()
        if self.pair:
            return PAIR_REGISTERS
        return (WIDENING_REGISTERS if self.wide_stages else REGISTERS)[self.warpgroups]

    @property
    def align(self) -> int:
        """The first row of a tile is a multiple of this number."""
        return self.part_rows if self.paged else 8 if self.direct else 1

    @property
    def stored_dim(self) -> int:
        """Columns of partial results. A warpgroup of 128 threads reads one query row at a time. If kv heads are joined, it reads
        128 columns from the first one of the query row's own kv head on."""
        return round_up(self.value_dim, 128) + 128 * (self.joined > 1)

    @property
    def pieces(self) -> int:
        """About as many partial results as a query row has: a power of two."""
        each = -(-self.schedule.slots // self.schedule.batch)
        return 1 << (each - 1).bit_length()

    @property
    def merge_slots(self) -> int:
        """Partial results of a query row that are read at once: about as many as there are."""
        return min(max(self.pieces, LEAST_MERGED[self.many]), 16)

    @property
    def reduction_bytes(self) -> int:
        """Shared memory in which a sum or maximum over keys passes between warps, all query rows at once."""
        return 0 if self.pair or self.in_registers else 2048 if self.many else 128 * self.block_rows

    def shared_bytes(self) -> int:
        """Bytes of shared memory that a program needs, each array beginning at a multiple of 1024."""
        keys, rows, dim = self.place_rows, self.block_rows, self.block_dim
        tiles = keys * sum(ring.columns for ring in self.rings.values()) * (1 if self.in_registers else ITEMSIZE)
        narrow = [tiles // ITEMSIZE * self.stages, *[self.scales_copied * 4 * self.stages, keys * 4 * self.wide_stages] * 2]
        weights = self.terms if self.pair else 0 if self.many else MOST_TERMS
        arrays = narrow if self.wide_stages else []
        if self.in_registers:  # scales, queries, numbers that pass between warps, and results of the second warpgroup
            arrays += [self.joined * self.scales_copied * 4 * self.stages] * 2
            arrays += [self.warpgroups * rows * size for size in (dim * ITEMSIZE, 128)]
            arrays += [rows * size for size in (self.value_dim * 4, 2 * 4)]
            weights *= self.warpgroups
        arrays += [
            tiles * (self.wide_stages or self.stages),
            tiles * (not self.direct),
            self.query_slots * rows * self.query_dim * ITEMSIZE,
            weights * rows * keys * ITEMSIZE,
            2 * 2 * rows * 4 * self.pair,
        ]
        arrays += [self.reduction_bytes, BARRIERS, table_entries(self.table, self.table_step) * 4]
        return sum(round_up(size, 1024) for size in arrays)


def begins_at(sequence, seq_len: int):
    """Where a sequence begins if the rows of all sequences lie end to end: the number of a row that 8 divides, and how many rows
    early, up to 7, this row is. A copy can begin there."""
    first = sequence * seq_len
    return first & -8, first & 7


def begins_in_line(head, columns: int):
    """Where a joined kv head of so many columns of 8 bits begins in a row of the cache: the first column of its line, and how many
    columns early this is."""
    first = head * columns
    return first & -OPERAND_DIM, first & (OPERAND_DIM - 1)


def table_entries(sequences: int, step: int) -> int:
    """Numbers in a table with one entry for `step` sequences: a multiple of 8, because a copy takes 16 bytes at least. If `step` is
    above 1, each block writes beyond its own entries."""
    return sequences if step == 1 else round_up(sequences // step, 8) + BLOCK_SEQUENCES


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
