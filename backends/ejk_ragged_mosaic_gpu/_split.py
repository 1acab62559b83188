"""The kernel that reads the cache: programs of two warpgroups, of which one has tiles of keys and values copied into shared memory,
and the other multiplies.

Few rows of queries stand against many keys, and the tensor cores take 64 rows of the one and 8 of the other. So logits are computed
as K Q^T, [keys, rows], and the output as V^T P^T, [dims, rows]: next to nothing is multiplied that is not there, and what a thread
holds of a tile are a few numbers. Maxima and sums over keys pass between warps; the sum waits for the end of a piece.

Inside, logits are in base 2: `exp2` is one instruction, and the factor log2(e) rides on the scale. Outside all is natural.
"""

import dataclasses
import functools
import math
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ejk_ragged_schedule import cdiv, Line

from ._jax import launch, LOWEST, plgpu
from ._tuning import BLOCK_SEQUENCES, round_up, Tiles


LOG2_E = math.log2(math.e)
MEMORY, COMPUTE = range(2)  # the warpgroups
TILED = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # how products want 16-bit operands in shared memory
TILED_FLOAT32 = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
TILE = plgpu.Layout.WGMMA  # which thread holds what of an array [keys, rows], or [dims, rows]
OF_ROWS, OF_KEYS = TILE.reduce(0), TILE.reduce(1)  # and of [rows], and of [keys]


def split(problem, plan: Tiles, query, cache, lengths, row_bounds, **how):
    """Partial results of all pieces, and where on the line each sequence stops.

    Args:
        query: [B, Hkv, R, D], D padded.
        lengths: (start, end), int32 [B] or None.
        row_bounds: (start, end), int32 [B, rows of all blocks], or None where all rows see the same keys.

    Returns:
        parts: float32 [slots, Hkv, R, D or more], each weighted by a softmax of its own.
        lse: float32 [slots, Hkv, rows of all blocks], of these.
        stops: int32 [B or more]; only where the plan has a table.
    """
    dtype, rows, keys, dim, stages = problem.dtype, plan.block_rows, plan.schedule.block_keys, plan.block_dim, plan.stages
    _, heads, num_rows, _ = query.shape
    operands, tree = jax.tree.flatten((query, cache.key, cache.value, lengths, row_bounds))
    results = {
        "parts": ((plan.schedule.slots, heads, num_rows, plan.stored_dim), jnp.float32),
        "lse": ((plan.schedule.slots, heads, plan.row_blocks * rows), jnp.float32),
    }
    ring = (stages, keys, dim)
    shared = {
        "q": plgpu.SMEM((2, rows, dim), dtype, transforms=TILED),
        "k": plgpu.SMEM(ring, dtype, transforms=TILED if plan.direct else ()),
        "v": plgpu.SMEM(ring, dtype, transforms=TILED if plan.direct else ()),
        "p": plgpu.SMEM((rows, keys), dtype, transforms=TILED),
        "out": plgpu.SMEM((rows, dim), jnp.float32, transforms=TILED_FLOAT32),
        "lse": plgpu.SMEM((rows,), jnp.float32),
    }
    for name, number in (("q", 2), ("k", stages), ("v", stages)):
        shared |= {f"{name}_full": plgpu.Barrier(num_barriers=number), f"{name}_free": plgpu.Barrier(num_barriers=number)}
    if not plan.direct:
        shared |= {f"{name}_tile": plgpu.SMEM((keys, dim), dtype, transforms=TILED) for name in "kv"}
    if plan.table:
        results["stops"] = (plan.table,), jnp.int32
        shared |= {"stops": plgpu.SMEM((plan.table,), jnp.int32), "stops_full": plgpu.Barrier()}
    return launch(
        functools.partial(_kernel, tree=tree, problem=problem, plan=plan, results=tuple(results)),
        "ragged_decode_split",
        results.values(),
        {"block": heads * plan.row_blocks, "program": plan.schedule.programs},
        follows=False,
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=shared,
        reduction_bytes=plan.reduction_bytes,
        **how,
    )(*operands)


def _kernel(*refs, tree, problem, plan, results, **shared):
    inputs, outputs = refs[: tree.num_leaves], refs[tree.num_leaves :]
    query, key, value, lengths, row_bounds = tree.unflatten(inputs)
    block = lax.axis_index("block")
    program = _Program(
        problem=problem,
        plan=plan,
        number=lax.axis_index("program"),
        head=lax.div(block, plan.row_blocks),
        row_block=lax.rem(block, plan.row_blocks),
        query=query,
        cache=(key, value),
        lengths=lengths,
        row_bounds=row_bounds,
        results=types.SimpleNamespace(**dict(zip(results, outputs, strict=True))),
        shared=types.SimpleNamespace(**shared),
    )
    pl.when(lax.axis_index("warpgroup") == MEMORY)(program.copy)
    pl.when(lax.axis_index("warpgroup") == COMPUTE)(program.compute)


class Piece(NamedTuple):
    """A program's part of a sequence.

    Attributes:
        sequence: number of the sequence.
        start, end: the sequence's range.
        row: the key with which the first tile begins.
        num_tiles: none, if others who share the stretch have all keys.
        number: how many pieces the program has done before.
        tiles_before: and how many tiles.
    """

    sequence: Any
    start: Any
    end: Any
    row: Any
    num_tiles: Any
    number: Any
    tiles_before: Any


@dataclasses.dataclass(frozen=True)
class _Program:
    """One program: its pieces, for one block of the rows of queries of a kv head."""

    problem: Any
    plan: Tiles
    number: Any
    head: Any
    row_block: Any
    query: Any
    cache: Any
    lengths: Any
    row_bounds: Any
    results: Any
    shared: Any

    # -----------------------------------------------------------------------------------------------------------------------
    # Which keys are whose

    def make_table(self):
        """Sums up the rounds of the sequences, for this program alone: where on the line each of them stops."""
        plan, shared, batch = self.plan, self.shared, self.problem.batch

        def sum_up(first, count, total):
            number = plgpu.broadcasted_iota(jnp.int32, (round_up(count, 8),), 0, layout=OF_ROWS) + first
            start, end = (None if ref is None else _lengths(ref, first, count) for ref in self.lengths)
            rounds = rounds_of(plan, *plan.schedule.clipped(number, start, end))
            square = BLOCK_SEQUENCES, rounds.size
            this, other = (plgpu.broadcasted_iota(jnp.int32, square, axis, layout=TILE) for axis in (0, 1))
            rounds = jnp.where(other <= this, lax.broadcast_in_dim(rounds, square, [1]), 0)
            shared.stops[pl.ds(first, BLOCK_SEQUENCES)] = jnp.sum(rounds, axis=1, dtype=jnp.int32) + total
            plgpu.commit_smem()
            return shared.stops[first + count - 1]

        whole, rest = divmod(batch, BLOCK_SEQUENCES)
        first = lambda i: pl.multiple_of(i * BLOCK_SEQUENCES, 8)
        total = lax.fori_loop(0, whole, lambda i, total: sum_up(first(i), BLOCK_SEQUENCES, total), jnp.int32(0))
        for count in (rest - rest % 8, rest % 8):
            if count:
                total = sum_up(batch - rest, count, total)
                rest -= count

    def line(self):
        """How many rounds the line has; of a place on it, which sequence lies there and where that begins; of a sequence, its
        range, and where it stops."""
        plan, stops, last = self.plan, getattr(self.shared, "stops", None), self.problem.batch - 1

        def range_of(b):
            return plan.schedule.clipped(b, *(None if ref is None else ref[b] for ref in self.lengths))

        if stops is None:
            b = lax.div(self.number, plan.schedule.workers)
            bounds = range_of(b)
            total = rounds_of(plan, *bounds)
            return total, lambda place: (b, jnp.int32(0)), lambda b: (*bounds, total)

        def find(place):
            number = jnp.int32(0)  # of sequences that stop at or before the place; the last one does not
            for digit in reversed(range(-(-last.bit_length() // 4))):  # by which few loads wait for each other
                step = 16**digit
                ends = [stops[jnp.minimum(number + i * step - 1, last)] for i in range(1, min(last // step, 15) + 1)]
                number += step * sum((end <= place).astype(jnp.int32) for end in ends)
            return number, jnp.where(number > 0, stops[jnp.maximum(number - 1, 0)], 0)

        return stops[last], find, lambda b: (*range_of(b), stops[b])

    def pieces(self, work):
        """Calls `work` with one piece after another."""
        plan, schedule = self.plan, self.plan.schedule
        worker = lax.rem(self.number, schedule.workers)
        total, find, at = self.line()
        first, count = schedule.stretch(worker, total)
        b, before = find(jnp.minimum(first, total - 1))

        def piece(carry):
            b, before, number, tiles = carry
            start, end, stop = at(b)
            begun = jnp.maximum(before, first)
            line = Line(worker, b, first_row(plan, start, end), end, stop - before, stop, total)
            origin, piece_end = schedule.piece(line)
            row = origin + begun * schedule.stride
            here = stop > begun
            num_tiles = jnp.where(here, cdiv(jnp.maximum(piece_end - row, 0), schedule.stride), 0)
            pl.when(here)(lambda: work(Piece(b, start, end, row, num_tiles, number, tiles)))
            return b + 1, stop, number + here.astype(jnp.int32), tiles + num_tiles

        before = jnp.where(count > 0, before, first)
        lax.while_loop(lambda carry: carry[1] < first + count, piece, (b, before, jnp.int32(0), jnp.int32(0)))

    # -----------------------------------------------------------------------------------------------------------------------
    # The warpgroup that copies

    def copy(self):
        plan, shared, schedule = self.plan, self.shared, self.plan.schedule
        if plan.table:
            self.make_table()
            plgpu.barrier_arrive(shared.stops_full)

        def into(name, slot, source):
            full, free = (getattr(shared, f"{name}_{state}").at[slot] for state in ("full", "free"))
            plgpu.barrier_wait(free)
            plgpu.copy_gmem_to_smem(source, getattr(shared, name).at[slot], full)

        def work(piece):
            rows = pl.ds(pl.multiple_of(self.row_block * plan.block_rows, 8), plan.block_rows)
            into("q", lax.rem(piece.number, 2), self.query.at[piece.sequence, self.head, rows])
            # As many dimensions as products take, zeros beyond the last; such a slice is not refused where its start is not known.
            dims = pl.ds(piece.number * 0, plan.block_dim)

            def tile(i, _):
                slot = lax.rem(piece.tiles_before + i, plan.stages)
                row = pl.multiple_of(piece.row + i * schedule.stride, plan.align)
                for name, ref in zip("kv", self.cache, strict=True):
                    source = ref.at[piece.sequence, pl.ds(row, schedule.block_keys), self.head]
                    into(name, slot, source if plan.direct else source.at[:, dims])

            lax.fori_loop(0, piece.num_tiles, tile, None)

        self.pieces(work)
        for name, number in (("q", 2), ("k", plan.stages), ("v", plan.stages)):
            for slot in range(number):  # nobody leaves while something is on its way
                plgpu.barrier_wait(getattr(shared, f"{name}_free").at[slot])

    # -----------------------------------------------------------------------------------------------------------------------
    # The warpgroup that multiplies

    def compute(self):
        plan, shared = self.plan, self.shared
        for name, number in (("q", 2), ("k", plan.stages), ("v", plan.stages)):
            for slot in range(number):
                plgpu.barrier_arrive(getattr(shared, f"{name}_free").at[slot])
        if plan.table:
            plgpu.barrier_wait(shared.stops_full)
            pl.when((self.number == 0) & (self.head == 0) & (self.row_block == 0))(
                lambda: plgpu.copy_smem_to_gmem(shared.stops, self.results.stops)
            )
        self.pieces(self.compute_piece)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # a kernel has ended when all that it wrote is there

    def compute_piece(self, piece: Piece):
        plan, shared = self.plan, self.shared
        rows, keys, dim = plan.block_rows, plan.schedule.block_keys, plan.block_dim
        q_slot = lax.rem(piece.number, 2)
        plgpu.barrier_wait(shared.q_full.at[q_slot])
        row_bounds = self.bounds_of_rows(piece)

        def tile(i, carry):
            acc, high, total = carry
            slot = lax.rem(piece.tiles_before + i, plan.stages)
            first = piece.row + i * plan.schedule.stride
            key = plgpu.broadcasted_iota(jnp.int32, (keys, rows), 0, layout=TILE) + first
            sees = (key >= piece.start) & (key < piece.end)
            for bound, holds in zip(row_bounds, (jnp.greater_equal, jnp.less), strict=True):
                if bound is not None:
                    sees = sees & holds(key, lax.broadcast_in_dim(bound, (keys, rows), [1]))

            plgpu.barrier_wait(shared.k_full.at[slot])
            k = self.laid_out("k", slot)
            x = _product(k, shared.q.at[q_slot].transpose((1, 0)))
            plgpu.barrier_arrive(shared.k_free.at[slot])
            x = jnp.where(sees, self.logits(x), _tile((keys, rows), -jnp.inf))
            new_high = jnp.maximum(jnp.maximum(high, jnp.max(x, axis=0)), LOWEST)
            fade = jnp.exp2(high - new_high)
            p = jnp.exp2(x - lax.broadcast_in_dim(new_high, x.shape, [1]))
            total = total * lax.broadcast_in_dim(fade, total.shape, [1]) + p
            shared.p.transpose((1, 0))[...] = plgpu.layout_cast(p.astype(self.problem.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()

            plgpu.barrier_wait(shared.v_full.at[slot])
            v = self.laid_out("v", slot, sees, (first < piece.start) | (first + keys > piece.end))
            acc = acc * lax.broadcast_in_dim(fade, acc.shape, [1]) + _product(v.transpose((1, 0)), shared.p.transpose((1, 0)))
            plgpu.barrier_arrive(shared.v_free.at[slot])
            return acc, new_high, total

        low = plgpu.layout_cast(jnp.full((rows,), LOWEST, jnp.float32), OF_ROWS)
        acc, high, total = lax.fori_loop(0, piece.num_tiles, tile, (_tile((dim, rows), 0), low, _tile((keys, rows), 0)))
        plgpu.barrier_arrive(shared.q_free.at[q_slot])
        self.store(piece, acc, high, jnp.sum(total, axis=0))

    def bounds_of_rows(self, piece):
        """The first key of each row and the end, of those that have their own."""
        places = pl.ds(pl.multiple_of(self.row_block * self.plan.block_rows, 8), self.plan.block_rows)
        return [
            None if ref is None else plgpu.load(ref.at[piece.sequence, places], layout=OF_ROWS, optimized=False)
            for ref in self.row_bounds
        ]

    def laid_out(self, name, slot, sees=None, at_an_end=False):
        """A tile that has arrived, as products take it. Given what the rows see, it has zeros where nobody does, `at_an_end` of the
        range or between tokens: 0 times what is there may be NaN."""
        plan, shared = self.plan, self.shared
        arrived = getattr(shared, name).at[slot]
        tile = arrived if plan.direct else getattr(shared, f"{name}_tile")

        def lay_out():
            values = plgpu.load(arrived, layout=TILE, optimized=plan.direct)
            if sees is not None:
                seen = jnp.max(sees.astype(jnp.int32), axis=1) > 0
                values = jnp.where(lax.broadcast_in_dim(seen, values.shape, [0]), values, _tile(values.shape, 0, values.dtype))
            tile[...] = values
            plgpu.commit_smem()

        if not plan.direct or (sees is not None and self.problem.gaps):
            lay_out()
        elif sees is not None:
            pl.when(at_an_end)(lay_out)
        return tile

    def logits(self, products):
        """Base-2 logits of the products q . k: scaled, then capped."""
        cap = self.problem.logits_soft_cap
        if cap is None:
            return products * (self.problem.softmax_scale * LOG2_E)
        # The instruction for tanh is good for 11 bits only. 1 - 2 / (exp(2 u) + 1) cancels where u is small, so there it is a
        # polynomial, fitted to float32 for u * u < 1/4.
        u = products * (self.problem.softmax_scale / cap)
        v = u * u
        near = u + u * (v * (-0.33333312 + v * (0.13330514 + v * (-0.05339106 + v * 0.01799922))))
        far = 1 - 2 / (jnp.exp2(u * (2 * LOG2_E)) + 1)
        return jnp.where(v < 0.25, near, far) * (cap * LOG2_E)

    def store(self, piece, acc, high, total):
        """A piece's results."""
        plan, shared, results = self.plan, self.shared, self.results
        slot = plan.schedule.slot(self.number, piece.sequence)
        places = pl.ds(pl.multiple_of(self.row_block * plan.block_rows, 8), plan.block_rows)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out = acc / lax.broadcast_in_dim(total, acc.shape, [1])
        shared.out.transpose((1, 0))[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
        shared.lse[...] = jnp.where(some, high / LOG2_E + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.out, results.parts.at[slot, self.head, places, pl.ds(0, plan.block_dim)])
        plgpu.copy_smem_to_gmem(shared.lse, results.lse.at[slot, self.head, places])


def _lengths(ref, first, count):
    """Those of `count` sequences; fewer than 8 are read one by one, and zeros follow."""
    if count % 8 == 0:
        return plgpu.load(ref.at[pl.ds(first, count)], layout=OF_ROWS, optimized=False)
    place = plgpu.broadcasted_iota(jnp.int32, (8,), 0, layout=OF_ROWS)
    return sum((place == i).astype(jnp.int32) * ref[first + i] for i in range(count))


def first_row(plan, start, end):
    """Where the tiles of a range begin: with a row that a copy can begin with."""
    return jnp.where(start < end, start & -plan.align, start)


def rounds_of(plan, start, end):
    return plan.schedule.rounds(first_row(plan, start, end), end)


def _tile(shape, value, dtype=jnp.float32):
    return plgpu.layout_cast(jnp.full(shape, value, dtype), TILE)


def _product(a, b):
    """a @ b in float32, of arrays in shared memory."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
