"""Code that the kernels share: blocks of query rows, tiles of the cache, products and logits."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


LOG2_E = math.log2(math.e)
LOWEST = float(jnp.finfo(jnp.float32).min)  # used in place of -inf if -inf - -inf would give NaN
HIGHEST = -LOWEST
WHOLE = pl.BlockSpec(memory_space=pl.ANY)  # arrays stay in global memory, and kernels index them


@dataclasses.dataclass(frozen=True)
class Block:
    """The query rows of a program. A query row is one token and one query head of the program's kv head.

    Arrays with one entry per token and query head have one axis for both in the kernels: [B, T * Hq, ...].

    Attributes:
        kv_head: number of the kv head.
        tokens: numbers of the query rows' tokens, [block_rows]. 0 if there is one token.
        places: indices of the query rows on the axis T * Hq, [block_rows].
        ok: mask of the query rows that exist. The others are padding. [block_rows].
        joined: which of the joined kv heads is that of the query row, [block_rows]. None if no kv heads are joined.
    """

    kv_head: Any
    tokens: Any
    places: Any
    ok: Any
    joined: Any = None

    @classmethod
    def of(cls, kv_head, row_block, problem, tiles) -> "Block":
        """The block of a kv head of `problem`, whose kv heads may be joined ones, each of `tiles.joined_heads`."""
        rows = row_block * tiles.block_rows + jnp.arange(tiles.block_rows, dtype=jnp.int32)
        ok = rows < problem.num_tokens * problem.group
        tokens, in_group = (0, rows) if problem.num_tokens == 1 else (rows // problem.group, rows % problem.group)
        places = tokens * problem.num_q_heads + kv_head * problem.group + in_group
        heads = tiles.joined_heads
        return cls(kv_head, tokens, places, ok, None if heads == 1 else in_group // (problem.group // heads))

    def of_query(self, ref, b, part):
        """The place and the mask of a part of this block, in an array like the query, for sequence `b`: [block_rows, part.size].

        The part is one of the joined kv heads, and the array has the columns of the query row's own kv head only.
        """
        if self.joined is None:
            return ref.at[b, self.places[:, None], part.dims[None, :]], part.masked(self.ok)
        columns = part.dims[None, :] - (self.joined * ref.shape[2])[:, None]
        return ref.at[b, self.places[:, None], columns], self.ok[:, None] & (columns >= 0) & (columns < ref.shape[2])

    def of_row(self, ref, b):
        """The place and the mask of this block, in an array of one number per query row, for sequence `b`: [block_rows]."""
        return ref.at[b, self.places], self.ok

    def of_cache(self, ref, place, live, part):
        """The place and the mask of a part of the rows at `place`, in an array like the cache: [keys, part.size].

        `place` comes from `Rows.place`. Rows that are not live are masked: they are not read, so they may hold anything.
        """
        page, rows = place
        page = page[:, None] if getattr(page, "ndim", 0) else page
        return ref.at[page, rows[:, None], self.kv_head, part.dims[None, :]], part.masked(live)

    def scales(self, problem, ref, place, live):
        """The scales of the rows at `place`, [keys]. None without a ref, or if all rows of a sequence have the same scale."""
        if ref is None or alike(problem, ref):
            return None
        sizes = zip((place[0], self.kv_head, place[1]), ref.shape, strict=True)
        return load((ref.at[*(number if size > 1 else jnp.zeros_like(number) for number, size in sizes)], live))

    def common_scale(self, problem, ref, b):
        """The scale that all rows of sequence `b` have. 1 without a ref, or if rows have different scales."""
        if ref is None or not alike(problem, ref):
            return 1.0
        return ref[*(number if size > 1 else 0 for number, size in zip((b, self.kv_head), ref.shape[:2], strict=True)), 0]

    def sees(self, lengths, b, keys, live):
        """Which live keys each query row sees: [block_rows, keys], or [1, keys] if all query rows see the same keys."""
        mask = live[None, :]
        if (ref := lengths.get("token_end")) is not None:
            mask = mask & (keys[None, :] < load((ref.at[b, self.tokens], self.ok))[:, None])
        if (ref := lengths.get("token_start")) is not None:
            mask = mask & (keys[None, :] >= load((ref.at[b, self.tokens], self.ok))[:, None])
        return mask


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile of keys or values.

    Attributes:
        parts: the dimensions in parts, [keys, size] each.
        scales: one scale per row, [keys], or None.
    """

    parts: Any
    scales: Any

    def cleaned(self, sees):
        """The tile with 0 in rows that no query row sees."""
        seen = jnp.max(sees.astype(jnp.int32), axis=0) > 0
        parts = [jnp.where(seen[:, None], part, jnp.zeros((), part.dtype)) for part in self.parts]
        return Tile(parts, self.scales if self.scales is None else jnp.where(seen, self.scales, 0.0))


def load_tile(problem, plan, block, cache, place, live) -> tuple[Tile, Tile]:
    """The tiles of keys and values at `place`.

    If the value is in the key's rows, a part that both have is loaded once. A quantised part is also widened once, to the query's
    dtype. Registers have no room for two widened parts.
    """
    keys = [load(block.of_cache(cache.key, place, live, part)) for part in plan.key_parts]
    if problem.value_columns is None:
        values = [load(block.of_cache(cache.value, place, live, part)) for part in plan.value_parts]
    else:
        column, _ = problem.value_columns
        keys = [widened(tile, problem.dtype) for tile in keys]
        loaded = dict(zip(plan.key_parts, keys, strict=True))
        columns = [part.moved(column) for part in plan.value_parts]
        values = [loaded[part] if part in loaded else load(block.of_cache(cache.key, place, live, part)) for part in columns]
    scales = (block.scales(problem, ref, place, live) for ref in (cache.key_scale, cache.value_scale))
    return tuple(Tile(parts, of_rows) for parts, of_rows in zip((keys, values), scales, strict=True))  # pyright: ignore[reportReturnType]


def products(problem, q, tiles):
    """The products of query rows, or of their cotangents, with the rows of a tile: [block_rows, keys]. Both come in parts."""
    return sum(query_dot(problem, x, tile.T) for x, tile in zip(q, tiles, strict=True))


def alike(problem, scale_ref):
    """Whether all rows of a sequence have the same scale. In pages, all pages must have the same scale, too."""
    return scale_ref.shape[2] == 1 and (scale_ref.shape[0] == 1 or not problem.paged)


def line_of(schedule, program, start_ref, end_ref, align=1):
    """The line on which `program` works, in strips. Starts are rounded down to multiples of `align`. Either ref may be None."""

    def lengths(number):
        there = number < schedule.batch
        start, end = (None if ref is None else load((ref.at[number], there)) for ref in (start_ref, end_ref))
        if start is not None and align > 1:
            start = jnp.maximum(start, 0) // align * align
        return number, start, end

    return schedule.line(program, [lengths(number) for number in schedule.sequences(program)])


def store_pieces(schedule, line, pieces_ref):
    """Writes [2, B]: the first slot and the number of pieces of each sequence. The first worker of a line writes for the line."""

    @pl.when(line[0].worker == 0)
    def _():
        for strip in line:
            for row, values in enumerate(schedule.pieces(strip)):
                plgpu.store(pieces_ref.at[row, strip.number], values, mask=strip.number < schedule.batch)


def load(where):
    """The values at a (place, mask), and zeros where the mask is false."""
    ref, mask = where
    return plgpu.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def store(where, values):
    """Writes values to a (place, mask), in the dtype of the array."""
    ref, mask = where
    plgpu.store(ref, values.astype(ref.dtype), mask=mask)


def logits(problem, products, key_scales=None, common_scale=1.0):
    """Base-2 logits from the products q . k: scaled, then capped. The factor log2(e) is part of the scale.

    The minimum changes no finite logit. It keeps the compiler from fusing the factor with the later subtraction of the largest
    logit. The fused operation would subtract a rounded number from one that is not rounded. If logits are large, this rounding
    error is large in an exponent.
    """
    cap = problem.logits_soft_cap
    factor = problem.softmax_scale * (LOG2_E if cap is None else 1 / cap) * common_scale
    x = products * (factor if key_scales is None else (key_scales * factor)[None, :])
    return jnp.minimum(x if cap is None else jnp.tanh(x) * (cap * LOG2_E), HIGHEST)


def logits_slope(problem, base2_logits):
    """The derivative of the natural logits with respect to the products q . k, without the scale of the cache."""
    if problem.logits_soft_cap is None:
        return problem.softmax_scale
    tanh = base2_logits * (1 / (problem.logits_soft_cap * LOG2_E))
    return (1 - tanh * tanh) * problem.softmax_scale


def dot(problem, a, b):
    """a @ b, summed in float32. float32 operands are rounded to tf32 only if `problem.precision` allows it."""
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=problem.precision, preferred_element_type=jnp.float32)


def query_dot(problem, q, tile):
    """q @ tile, for query rows or their cotangents, and a tile of the cache that may be quantised."""
    return dot(problem, q, widened(tile, q.dtype))


def value_dot(problem, p, v, scale=None):
    """(p * scale) @ v, for probabilities p of at most 1, summed in float32."""
    # If the result stays in the accumulation dtype, p must not be rounded: the result is subtracted from others, as in delta.
    product = fine_dot if problem.keeps_accum_dtype else lambda problem, p, v: dot(problem, p.astype(v.dtype), v)
    # float16 holds every 8-bit number exactly, and rounds p less than bfloat16 does.
    v = widened(v, jnp.float16 if v.dtype.itemsize == 1 and problem.dtype != jnp.float32 else problem.dtype)
    if scale is None:
        return product(problem, p, v)
    # Scales are relative to the tile's largest scale. A single key then has a weight of exactly 1, and no weight overflows.
    largest = jnp.max(jnp.abs(scale))
    largest = jnp.where(largest > 0, largest, 1.0)
    return product(problem, p * (scale / largest)[None, :], v) * largest


def key_dot(problem, d_x, k, scale=None):
    """(d_x * scale) @ k, for gradients d_x of any size, summed in float32.

    For each query row, d_x sums up to 0 over the keys, so a component that all keys share cancels. If d_x were rounded to 16 bits,
    the component would not cancel.
    """
    d_x = d_x if scale is None else d_x * scale[None, :]
    k = widened(k, problem.dtype)
    if problem.dtype != jnp.float16:
        return fine_dot(problem, d_x, k)
    # d_x is relative to the largest d_x of the query row. So no number overflows, and small ones lose no bits.
    least = float(jnp.finfo(jnp.float16).smallest_subnormal)
    largest = jnp.maximum(jnp.max(jnp.abs(d_x), axis=1), least)[:, None]
    return fine_dot(problem, d_x * (1 / largest), k) * largest


def fine_dot(problem, a, b):
    """a @ b for b of 16 bits, without rounding a to 16 bits: the product of the rounded a, plus the product of the remainder."""
    rounded = a.astype(b.dtype)
    if a.dtype == b.dtype:
        return dot(problem, a, b)
    rest = (a - rounded.astype(a.dtype)).astype(b.dtype)
    return dot(problem, rounded, b) + dot(problem, rest, b)


def widened(tile, dtype):
    """A tile of the cache as `dtype`, which holds all numbers of the tile exactly."""
    if tile.dtype == jnp.float8_e4m3fn and dtype == jnp.bfloat16:
        # On this way, one instruction converts two numbers. A direct conversion to bfloat16 uses a slow unit for each number.
        tile = tile.astype(jnp.float16).astype(jnp.float32)
    return tile.astype(dtype)
