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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ._jax import launch, LOWEST, OF_ROWS, plgpu, store, TILE
from ._line import Piece, Ranges
from ._tuning import terms_of_weights, Tiles


LOG2_E = math.log2(math.e)
MEMORY, COMPUTE = range(2)  # the warpgroups
TILED = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # how products want 16-bit operands in shared memory


def split(problem, plan: Tiles, query, cache, lengths, row_bounds, **how):
    """Partial results of all pieces.

    Args:
        query: [B, Hkv, R, D], D padded.
        lengths: (start, end), int32 [B] or None.
        row_bounds: (start, end), int32 [B, rows of all blocks], or None where all rows see the same keys.

    Returns:
        parts: float32 [slots, Hkv, rows of all blocks, D or more], sums of values, not divided by those of their weights.
        stats: float32 [slots, Hkv, 2, rows of all blocks], the largest logit, and the sum of the weights relative to that one. In
            one number, their log-sum-exp, the sum would be lost beside a large logit.
    """
    dtype, rows, keys, dim, stages = problem.dtype, plan.block_rows, plan.schedule.block_keys, plan.block_dim, plan.stages
    heads, num_rows = query.shape[1], plan.row_blocks * rows
    operands, tree = jax.tree.flatten((query, cache.key, cache.value, lengths, row_bounds))
    results = {
        "parts": ((plan.schedule.slots, heads, num_rows, plan.stored_dim), jnp.float32),
        "stats": ((plan.schedule.slots, heads, 2, num_rows), jnp.float32),
    }
    ring = (stages, keys, dim)
    shared = {
        "q": plgpu.SMEM((2, rows, dim), dtype, transforms=TILED),
        "k": plgpu.SMEM(ring, dtype, transforms=TILED if plan.direct else ()),
        "v": plgpu.SMEM(ring, dtype, transforms=TILED if plan.direct else ()),
        "p": plgpu.SMEM((terms_of_weights(problem), rows, keys), dtype, transforms=TILED),
    }
    for name, number in (("q", 2), ("k", stages), ("v", stages)):
        shared |= {f"{name}_full": plgpu.Barrier(num_barriers=number), f"{name}_free": plgpu.Barrier(num_barriers=number)}
    if not plan.direct:
        shared |= {f"{name}_tile": plgpu.SMEM((keys, dim), dtype, transforms=TILED) for name in "kv"}
    if plan.table:
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
    ranges = Ranges(plan, lengths, shared.pop("stops", None))
    block = lax.axis_index("block")
    program = _Program(
        problem=problem,
        plan=plan,
        number=lax.axis_index("program"),
        head=lax.div(block, plan.row_blocks),
        row_block=lax.rem(block, plan.row_blocks),
        query=query,
        cache=(key, value),
        ranges=ranges,
        row_bounds=row_bounds,
        results=types.SimpleNamespace(**dict(zip(results, outputs, strict=True))),
        shared=types.SimpleNamespace(**shared),
    )
    pl.when(lax.axis_index("warpgroup") == MEMORY)(program.copy)
    pl.when(lax.axis_index("warpgroup") == COMPUTE)(program.compute)


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
    ranges: Ranges
    row_bounds: Any
    results: Any
    shared: Any

    def first_key(self, piece, i):
        """Of the piece's tile i."""
        return piece.row + i * self.plan.schedule.stride

    def row_of(self, piece, first):
        """Where the tile that begins with key `first` is read: further back at the end of a range, where there are rows that have
        been read just before, and are in the GPU's second-level cache, in place of rows that nobody sees."""
        end = (piece.end + self.plan.align - 1) & -self.plan.align
        return jnp.maximum(jnp.minimum(first, end - self.plan.schedule.block_keys), 0)

    # -----------------------------------------------------------------------------------------------------------------------
    # The warpgroup that copies

    def copy(self):
        plan, shared, schedule = self.plan, self.shared, self.plan.schedule
        self.ranges.make_table()
        if plan.table:
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
                row = pl.multiple_of(self.row_of(piece, self.first_key(piece, i)), plan.align)
                for name, ref in zip("kv", self.cache, strict=True):
                    source = ref.at[piece.sequence, pl.ds(row, schedule.block_keys), self.head]
                    into(name, slot, source if plan.direct else source.at[:, dims])

            lax.fori_loop(0, piece.num_tiles, tile, None)

        self.ranges.pieces(self.number, work)
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
        self.ranges.pieces(self.number, self.compute_piece)

    def compute_piece(self, piece: Piece):
        plan, shared = self.plan, self.shared
        rows, keys, dim = plan.block_rows, plan.schedule.block_keys, plan.block_dim
        q_slot = lax.rem(piece.number, 2)
        plgpu.barrier_wait(shared.q_full.at[q_slot])
        row_bounds = self.bounds_of_rows(piece)

        def tile(i, carry):
            acc, high, total = carry
            slot = lax.rem(piece.tiles_before + i, plan.stages)
            first = self.first_key(piece, i)
            row = self.row_of(piece, first)
            key = plgpu.broadcasted_iota(jnp.int32, (keys, rows), 0, layout=TILE) + row
            sees = (key >= jnp.maximum(first, piece.start)) & (key < piece.end)
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
            terms = [shared.p.at[i].transpose((1, 0)) for i in range(shared.p.shape[0])]
            for term in terms:
                rounded = p.astype(self.problem.dtype)
                term[...] = plgpu.layout_cast(rounded, plgpu.Layout.WGMMA_TRANSPOSED)
                p = p - rounded.astype(jnp.float32)
            plgpu.commit_smem()

            plgpu.barrier_wait(shared.v_full.at[slot])
            v = self.laid_out("v", slot, sees, (row < piece.start) | (row + keys > piece.end))
            acc = acc * lax.broadcast_in_dim(fade, acc.shape, [1]) + _product(v.transpose((1, 0)), *terms)
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

        if not plan.direct or (sees is not None and self.problem.junk_between_tokens):
            lay_out()
        elif sees is not None:
            pl.when(at_an_end)(lay_out)
        return tile

    def logits(self, products):
        """Base-2 logits of the products q . k: scaled, then capped.

        They are rounded numbers: the minimum, which changes no finite one, keeps the compiler from fusing the factor and a later
        subtraction. What is subtracted is the largest of them, and beside a large one a rounding is much in an exponent.
        """
        cap = self.problem.logits_soft_cap
        if cap is None:
            return jnp.minimum(products * (self.problem.softmax_scale * LOG2_E), -LOWEST)
        # The instruction for tanh is good for 11 bits only. 1 - 2 / (exp(2 u) + 1) cancels where u is small, so there it is a
        # polynomial, fitted to float32 for u * u < 1/4.
        u = products * (self.problem.softmax_scale / cap)
        v = u * u
        near = u + u * (v * (-0.33333312 + v * (0.13330514 + v * (-0.05339106 + v * 0.01799922))))
        far = 1 - 2 / (jnp.exp2(u * (2 * LOG2_E)) + 1)
        return jnp.minimum(jnp.where(v < 0.25, near, far) * (cap * LOG2_E), -LOWEST)

    def store(self, piece, acc, high, total):
        """A piece's results, from registers: nobody waits for them."""
        plan, results = self.plan, self.results
        slot = plan.schedule.slot(self.number, piece.sequence)
        places = pl.ds(pl.multiple_of(self.row_block * plan.block_rows, 8), plan.block_rows)
        parts = results.parts.at[slot, self.head, places, pl.ds(0, plan.block_dim)]
        store(parts.transpose((1, 0)), plgpu.layout_cast(acc, plgpu.Layout.WGMMA_TRANSPOSED))
        for i, values in enumerate((high / LOG2_E, total)):
            store(results.stats.at[slot, self.head, i, places], values)


def _tile(shape, value, dtype=jnp.float32):
    return plgpu.layout_cast(jnp.full(shape, value, dtype), TILE)


def _product(a, *terms):
    """`a` times the sum of some others, in float32, of arrays in shared memory."""

    def multiply(acc):
        for b in terms:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], terms[0].shape[1]), jnp.float32))
