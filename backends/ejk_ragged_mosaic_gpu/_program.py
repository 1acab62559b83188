"""One program of the kernel that reads the cache: what its warpgroups have in common.

Inside, logits are in base 2, because `exp2` is one instruction. The scale contains the factor log2(e). Results are natural.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._jax import LOWEST, OF_COLUMNS, OF_ROWS, plgpu, TILE
from ._line import Piece, Ranges
from ._tiles import begins_in_line, SCALES_AT_ONCE, Tiles


LOG2_E = math.log2(math.e)
AT_ONCE = 256  # dimensions of a tile that are in registers at once


def tiling(columns, dtype, line=128):
    """How products and copies want arrays of so many columns in shared memory: in lines of up to `line` bytes."""
    swizzle = math.gcd(columns * jnp.dtype(dtype).itemsize, line)
    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)


TILED = tiling(64, jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Program:
    """The pieces of one program, for one block of the query rows of a kv head.

    Attributes:
        problem, plan: the static facts.
        interpreted: whether Pallas' interpreter runs the kernel.
        number: which program of the line it is.
        head: the kv head.
        query_block: which block of the head's query rows.
        query: ref [B, T, Hkv, G, D]; `plan` says which T, G and D.
        cache: refs of key and value.
        scales: refs of the scales of "k" and "v", as in `ejk_ragged.Cache`, or None each. Where the rows of all sequences lie end
            to end, those by row do so too [B * Hkv or 1 * S].
        page_table: ref of the page table, or None.
        ranges: where the pieces are.
        query_bounds: refs of first rows and ends, as for `split`.
        sink: ref of each query row's sink, float32 [B or 1, Hkv, query rows of all blocks], or None.
        results: refs of the results, by name.
        shared: what is in shared memory, by name.
    """

    problem: Any
    plan: Tiles
    interpreted: bool
    number: Any
    head: Any
    query_block: Any
    query: Any
    cache: Any
    scales: Any
    page_table: Any
    ranges: Ranges
    query_bounds: Any
    sink: Any
    results: Any
    shared: Any

    def first_key(self, piece: Piece, i):
        """The first row of tile i of the piece."""
        return piece.row + i * self.plan.schedule.stride

    def row_of(self, piece: Piece, first):
        """Where the tile that begins with row `first` is read. The last tile of a range is read further back. It then holds rows
        that were read just before and are in the GPU's second-level cache, in place of rows that no token sees."""
        end = (piece.end + self.plan.align - 1) & -self.plan.align
        return jnp.maximum(jnp.minimum(first, end - self.plan.schedule.block_keys), 0)

    def query_rows(self, warpgroup=0) -> Any:
        """The query rows of this program, or of one of its warpgroups, among all of the kv head."""
        size = self.plan.warpgroup_rows
        return pl.ds(pl.multiple_of(self.query_block * self.plan.block_rows + warpgroup * size, 8), size)

    def bounds(self, piece: Piece, query_rows, layout):
        """First rows and ends of some query rows, from those of their tokens: int32 [query rows] or None each. Also the first row
        and the end of what all of these query rows see."""
        problem, bounds, seen_by_all = self.problem, [], []
        first, last = lax.div(query_rows.start, problem.group), problem.num_tokens - 1
        count = min(last + 1, (query_rows.size - 2) // problem.group + 2)  # tokens that so many query rows may be of
        row = plgpu.broadcasted_iota(jnp.int32, (query_rows.size,), 0, layout=layout) + query_rows.start
        for ref, of_all, narrower in zip(self.query_bounds, (piece.start, piece.end), (jnp.maximum, jnp.minimum), strict=True):
            if ref is None:
                bounds.append(None)
            else:
                of_tokens = [ref[piece.sequence, jnp.minimum(first + i, last)] for i in range(count)]
                # A product: what is selected from a single number has no sign (see the tests).
                token = lax.div(row, problem.group) - first
                bounds.append(sum((token == i).astype(jnp.int32) * x for i, x in enumerate(of_tokens)))
                of_all = functools.reduce(narrower, of_tokens, of_all)
            seen_by_all.append(of_all)
        return bounds, seen_by_all

    def sees(self, piece: Piece, first, row, bounds, shape, axis):
        """Which query row sees which row of a tile: bool of `shape`, whose `axis` is that of the rows."""
        key = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE) + row
        sees = (key >= jnp.maximum(first, piece.start)) & (key < piece.end)
        for bound, holds in zip(bounds, (jnp.greater_equal, jnp.less), strict=True):
            if bound is not None:
                sees = sees & holds(key, lax.broadcast_in_dim(bound, shape, [1 - axis]))
        return sees

    def masked(self, piece: Piece, first, rows, bounds, seen_by_all, x, axis):
        """The logits of the parts of a tile, `x`, with -inf where a query row does not see a row.

        Args:
            first: the first row whose turn it is. Rows before it had their turn.
            rows: the rows at which the parts were read, one after another.
            bounds, seen_by_all: what `Program.bounds` returns. Only a tile beyond `seen_by_all` needs a mask.
            axis: the axis of the rows.
        """
        start, end = seen_by_all
        beyond = (rows[0] < jnp.maximum(first, start)) | (rows[-1] + x[-1].shape[axis] > end)

        def mask(*x):
            return [
                jnp.where(self.sees(piece, first, row, bounds, of_part.shape, axis), of_part, tile_of(of_part.shape, -jnp.inf))
                for row, of_part in zip(rows, x, strict=True)
            ]

        return lax.cond(beyond, mask, lambda *x: list(x), *x)

    def at_an_end(self, piece: Piece, row):
        """Whether the tile that is read at `row` holds rows outside the range. In a pair, that is half of a tile."""
        return (row < piece.start) | (row + self.plan.place_rows > piece.end)

    def logits(self, products):
        """Base-2 logits of the products q . k: scaled, then capped.

        The results are rounded numbers. The minimum changes no finite number, and keeps the compiler from fusing the factor and a
        later subtraction. What is subtracted is the largest logit, and a rounding of a large logit is much in an exponent.
        """
        cap = self.problem.logits_soft_cap
        if cap is None:
            return jnp.minimum(products * (self.problem.softmax_scale * LOG2_E), -LOWEST)
        # The instruction for tanh is good for 11 bits only. 1 - 2 / (exp(2 u) + 1) cancels where u is small. There, tanh is a
        # polynomial, fitted to float32 for u * u < 1/4.
        u = products * (self.problem.softmax_scale / cap)
        v = u * u
        near = u + u * (v * (-0.33333312 + v * (0.13330514 + v * (-0.05339106 + v * 0.01799922))))
        far = 1 - 2 / (jnp.exp2(u * (2 * LOG2_E)) + 1)
        return jnp.minimum(jnp.where(v < 0.25, near, far) * (cap * LOG2_E), -LOWEST)

    @property
    def factor(self) -> float:
        """A positive factor that base-2 logits need not have before the largest is subtracted; 1 where there is none. A difference
        of products is as exact as the products, and 0 for the largest, however large the products are."""
        factor = self.problem.softmax_scale * LOG2_E
        return factor if self.problem.logits_soft_cap is None and factor > float(jnp.finfo(jnp.float32).tiny) else 1.0

    def terms(self, p):
        """`p` as a sum of numbers of 16 bits: one, or two where the result is not rounded to 16 bits."""
        for _ in range(self.plan.terms):
            rounded = p.astype(self.plan.value_dtype(self.problem))
            yield rounded
            p = p - rounded.astype(jnp.float32)

    @property
    def headroom(self) -> int:
        """The base-2 logarithm of a factor by which the cache's numbers, times up to 2, stay in the range of float16."""
        dtype = self.problem.cache_dtype
        largest = -jnp.iinfo(dtype).min if jnp.issubdtype(dtype, jnp.integer) else float(jnp.finfo(dtype).max)
        return math.floor(math.log2(float(jnp.finfo(jnp.float16).max) / largest)) - 1

    def scale_of(self, piece: Piece, name):
        """The scale of "k" or "v" that all rows of the piece share, or None: there is none, or one per row. If kv heads are joined,
        each query row may have another scale: float32 [query rows]."""
        ref = self.scales[name]
        if ref is None or self.by_row(name):
            return None
        return self.of_query_rows([ref[piece.sequence if ref.shape[0] > 1 else 0, head, 0] for head in self.scale_heads(ref)])

    @property
    def columns_before(self):
        """How many columns of a tile come before those of the joined kv head: int32."""
        return begins_in_line(self.head, self.problem.head_dim)[1] if self.plan.shares_lines else jnp.int32(0)

    def scale_heads(self, ref):
        """The kv heads whose scales the program needs, of those that an array of scales has."""
        first = self.head * self.plan.joined
        return [first + i for i in range(self.plan.joined)] if heads_of(ref, self.problem) > 1 else [0]

    def first_scale(self, piece: Piece, name, i):
        """Where scales that lie end to end have that of row 0, for the kv head with number `i` of those of `scale_heads`."""
        ref = self.scales[name]
        return (piece.sequence * (heads_of(ref, self.problem) - 1) + self.scale_heads(ref)[i]) * self.problem.seq_len

    def copied_scales(self, piece: Piece, name, slot, part, i=0):
        """Ref of the scales [rows] of a part of a tile, as copies leave them. Where scales lie end to end, those before the tile's
        first one are copied too if they share its 16 bytes."""
        ref = getattr(self.shared, f"{'narrow_' if self.plan.wide_stages else ''}{name}_scale").at[slot]
        first = part.start + (self.first_scale(piece, name, i) & (SCALES_AT_ONCE - 1) if self.plan.end_to_end else 0)
        return (ref.at[i] if self.plan.in_registers else ref).at[pl.ds(first, part.size)]

    def of_heads(self, values, shape, axis, layout=TILE):
        """What belongs to each query row, from `values`, one for each joined kv head: an array whose `axis` is that of the query
        rows."""
        if len(values) == 1:
            return values[0]
        token_rows = self.problem.group
        row = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)
        head = lax.div(lax.rem(row, token_rows), token_rows // self.plan.joined)
        return functools.reduce(lambda found, i: jnp.where(head == i, values[i], found), range(1, len(values)), values[0])

    def of_query_rows(self, numbers):
        """One number for all query rows, or one for each joined kv head as [query rows]."""
        if len(numbers) == 1:
            return numbers[0]
        vectors = [plgpu.layout_cast(jnp.full((self.plan.block_rows,), x, jnp.float32), OF_COLUMNS) for x in numbers]
        return self.of_heads(vectors, vectors[0].shape, 0, OF_COLUMNS)

    def by_row(self, name) -> bool:
        """Whether "k" or "v" has a scale per row."""
        return self.scales[name] is not None and self.scales[name].shape[-1] > 1

    def clear(self, piece: Piece, row, values):
        """Sets rows of a tile of values, read at `row`, to zero where they lie outside the range: 0 times what such a row holds may
        be NaN."""
        size = math.gcd(64 if self.plan.pair else AT_ONCE, values.shape[1])  # a pair has few registers beside its sums

        def clear_part(i, _):
            part = values.at[:, pl.ds(pl.multiple_of(i * size, size), size)]
            layout = plgpu.Layout.SMEM_GMEM_COPY(part.shape, part.dtype, self.plan.line)
            key = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=layout) + row
            zeros = plgpu.layout_cast(jnp.zeros(part.shape, part.dtype), layout)
            part[...] = jnp.where((key >= piece.start) & (key < piece.end), plgpu.load(part, layout=layout), zeros)

        lax.fori_loop(0, values.shape[1] // size, clear_part, None)
        plgpu.commit_smem()

    def barriers(self, name):
        """The barriers of a ring: of places that are full, and of places that are free."""
        full, free = self.plan.filled_with.get(name, name), self.plan.freed_with.get(name, name)
        return getattr(self.shared, f"{full}_full"), getattr(self.shared, f"{free}_free")

    def release(self, *names):
        """Arrives at the barriers that say that all places of some rings are free."""
        for name in filter(self.plan.is_freed, names):
            for place in range(self.plan.places[name]):
                plgpu.barrier_arrive(self.barriers(name)[1].at[place])

    def drain(self, *names):
        """Waits until all places of some rings are free. So a program does not end while a copy is on its way."""
        for name in filter(self.plan.is_freed, names):
            for place in range(self.plan.places[name]):
                plgpu.barrier_wait(self.barriers(name)[1].at[place])


def heads_of(scale, problem) -> int:
    """How many kv heads have scales of their own."""
    return scale.shape[1] if len(scale.shape) == 3 else scale.shape[0] // (problem.batch * problem.seq_len)


def tile_of(shape, value, dtype=jnp.float32):
    """An array [.., ..] of one value, spread over the threads of a warpgroup."""
    return plgpu.layout_cast(jnp.full(shape, value, dtype), TILE)


def of_rows(size, value):
    """A vector of one value, one number per row of a matrix."""
    return plgpu.layout_cast(jnp.full((size,), value, jnp.float32), OF_ROWS)


def load_of_rows(ref):
    """A vector in memory, one number per row of a matrix."""
    return plgpu.load(ref, layout=OF_ROWS, optimized=False)


def sinks_at(ref, sequence, head, query_rows):
    """The sink of each query row, from what `Program.sink` refers to, or None."""
    return None if ref is None else load_of_rows(ref.at[sequence if ref.shape[0] > 1 else 0, head, query_rows])


def unknown_zero(i):
    """0 for the number `i` of a tile, but compilers do not know it.

    Without such a term, compilers compute the addresses of all parts of query and keys before the loop, and have no registers for
    them. Tiles leave little cache, so an address that is loaded again takes long.
    """
    return i >> 26


def over(x, like):
    """`x`, one number per row of the matrix `like`, over all its columns."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def over_rows(x, like):
    """`x`, one number per column of the matrix `like`, over all its rows."""
    return lax.broadcast_in_dim(x, like.shape, [1])


def plus_products(program, acc, *products):
    """`acc` and the products of pairs of operands, in float32. In the interpreter, all operands have to be in shared memory."""
    if program.interpreted:
        return functools.reduce(lambda acc, operands: acc + product(*operands), products, acc)

    def multiply(out):
        for a, b in products:
            plgpu.wgmma(out, a, b)

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def product(a, *terms):
    """`a` times the sum of `terms`, in float32, all in shared memory."""

    def multiply(acc):
        for b in terms:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], terms[0].shape[1]), jnp.float32))
