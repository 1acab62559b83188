"""What the kernels share: which rows of queries and which dimensions a program holds, tiles of the cache, products, and logits."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


LOG2_E = math.log2(math.e)
LOWEST = float(jnp.finfo(jnp.float32).min)  # stands in for -inf where a difference of two must not be NaN
HIGHEST = -LOWEST
WHOLE = pl.BlockSpec(memory_space=pl.ANY)  # arrays stay where they are; kernels index them


@dataclasses.dataclass(frozen=True)
class Block:
    """The query rows that a program works on, each a token and a head of one kv head, with a mask for the padding. Arrays with a
    query row for each token and head have one axis for both here, [B, T * Hq, ...].

    Attributes:
        kv_head: number of the kv head.
        tokens: numbers of the tokens, [block_rows]; 0 where there is one only.
        places, ok: where the query rows stand among all T * Hq, [block_rows].
    """

    kv_head: Any
    tokens: Any
    places: Any
    ok: Any

    @classmethod
    def of(cls, kv_head, row_block, problem, tiles) -> "Block":
        rows = row_block * tiles.block_rows + jnp.arange(tiles.block_rows, dtype=jnp.int32)
        ok = rows < problem.num_tokens * problem.group
        tokens, in_group = (0, rows) if problem.num_tokens == 1 else (rows // problem.group, rows % problem.group)
        places = tokens * problem.num_q_heads + kv_head * problem.group + in_group
        return cls(kv_head, tokens, places, ok)

    def of_query(self, ref, b, part):
        """Where an array like the query holds a part of this block of sequence `b`, and the mask; [block_rows, part.size]."""
        return ref.at[b, self.places[:, None], part.dims[None, :]], part.masked(self.ok)

    def of_row(self, ref, b):
        """Where an array of one number a row holds this block of sequence `b`, and the mask; [block_rows]."""
        return ref.at[b, self.places], self.ok

    def of_cache(self, ref, place, live, part, column=0):
        """Where an array like the cache holds a part of the rows at `place` (`Rows.place`), and the mask; [keys, part.size].

        Rows that are not live are masked, so that they are not even read, and what they hold can't matter.
        """
        page, rows = place
        page = page[:, None] if getattr(page, "ndim", 0) else page
        return ref.at[page, rows[:, None], self.kv_head, column + part.dims[None, :]], part.masked(live)

    def scales(self, problem, ref, place, live):
        """The scales of the rows at `place`, [keys]; None where all rows of a sequence have the same, or without a ref."""
        if ref is None or alike(problem, ref):
            return None
        sizes = zip((place[0], self.kv_head, place[1]), ref.shape, strict=True)
        return load((ref.at[*(number if size > 1 else jnp.zeros_like(number) for number, size in sizes)], live))

    def common_scale(self, problem, ref, b):
        """The scale that all rows of sequence `b` have; 1 where there is no such thing."""
        if ref is None or not alike(problem, ref):
            return 1.0
        return ref[*(number if size > 1 else 0 for number, size in zip((b, self.kv_head), ref.shape[:2], strict=True)), 0]

    def sees(self, lengths, b, keys, live):
        """Which of the keys that are live each query row sees, [block_rows, keys], or [1, keys] where all see the same."""
        mask = live[None, :]
        if (ref := lengths.get("token_end")) is not None:
            mask = mask & (keys[None, :] < load((ref.at[b, self.tokens], self.ok))[:, None])
        if (ref := lengths.get("token_start")) is not None:
            mask = mask & (keys[None, :] >= load((ref.at[b, self.tokens], self.ok))[:, None])
        return mask


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile of keys or of values: its dimensions in parts, each [keys, size], and one scale per row, or None."""

    parts: Any
    scales: Any

    def cleaned(self, sees):
        """0 at rows that no query row sees."""
        seen = jnp.max(sees.astype(jnp.int32), axis=0) > 0
        parts = [jnp.where(seen[:, None], part, jnp.zeros((), part.dtype)) for part in self.parts]
        return Tile(parts, self.scales if self.scales is None else jnp.where(seen, self.scales, 0.0))


def load_tile(problem, plan, block, cache, place, live) -> tuple[Tile, Tile]:
    """The keys and the values of the rows at `place`. Where both are in the key's rows, what is a part of both is loaded once."""
    keys = [load(block.of_cache(cache.key, place, live, part)) for part in plan.key_parts]
    if problem.value_columns is None:
        values = [load(block.of_cache(cache.value, place, live, part)) for part in plan.value_parts]
    else:
        column, _ = problem.value_columns
        loaded = {(part.first, part.size): tile for part, tile in zip(plan.key_parts, keys, strict=True)}
        values = [
            loaded.get((column + part.first, part.size))
            if part.first + part.size <= part.limit and column + part.first + part.size <= problem.head_dim
            else None
            for part in plan.value_parts
        ]
        values = [
            load(block.of_cache(cache.key, place, live, part, column)) if value is None else value
            for part, value in zip(plan.value_parts, values, strict=True)
        ]
    scales = (block.scales(problem, ref, place, live) for ref in (cache.key_scale, cache.value_scale))
    return tuple(Tile(parts, of_rows) for parts, of_rows in zip((keys, values), scales, strict=True))  # pyright: ignore[reportReturnType]


def products(problem, q, tiles):
    """The products of query rows, or of cotangents, with the rows of a tile, [block_rows, keys]; both in parts."""
    return sum(query_dot(problem, x, tile.T) for x, tile in zip(q, tiles, strict=True))


def alike(problem, scale_ref):
    """Whether all rows of a sequence have one scale; in pages only if all pages have."""
    return scale_ref.shape[2] == 1 and (scale_ref.shape[0] == 1 or not problem.paged)


def line_of(schedule, program, start_ref, end_ref, align=1):
    """The line on which `program` works, in strips; a ref of lengths may be None. Ranges begin at multiples of `align`."""

    def lengths(number):
        there = number < schedule.batch
        start, end = (None if ref is None else load((ref.at[number], there)) for ref in (start_ref, end_ref))
        if start is not None and align > 1:
            start = jnp.maximum(start, 0) // align * align
        return number, start, end

    return schedule.line(program, [lengths(number) for number in schedule.sequences(program)])


def store_pieces(schedule, line, pieces_ref):
    """The line's first worker writes down [2, B]: each sequence's first slot, and how many from there on are its pieces."""

    @pl.when(line[0].worker == 0)
    def _():
        for strip in line:
            for row, values in enumerate(schedule.pieces(strip)):
                plgpu.store(pieces_ref.at[row, strip.number], values, mask=strip.number < schedule.batch)


def load(where):
    """What stands at a place and mask; zeros where masked."""
    ref, mask = where
    return plgpu.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def store(where, values):
    ref, mask = where
    plgpu.store(ref, values.astype(ref.dtype), mask=mask)


def logits(problem, products, key_scales=None, common_scale=1.0):
    """Base-2 logits of the products q . k: scaled, then capped. (`exp2` is one instruction; log2(e) rides on the scale.)

    They are rounded numbers: the minimum, which changes no finite one, keeps the compiler from fusing the factor and a later
    subtraction. What is subtracted is the largest of them, and beside a large one a rounding is much in an exponent.
    """
    cap = problem.logits_soft_cap
    factor = problem.softmax_scale * (LOG2_E if cap is None else 1 / cap) * common_scale
    x = products * (factor if key_scales is None else (key_scales * factor)[None, :])
    return jnp.minimum(x if cap is None else jnp.tanh(x) * (cap * LOG2_E), HIGHEST)


def logits_slope(problem, base2_logits):
    """Derivative of the natural logits by the scaled products q . k."""
    if problem.logits_soft_cap is None:
        return problem.softmax_scale
    tanh = base2_logits * (1 / (problem.logits_soft_cap * LOG2_E))
    return (1 - tanh * tanh) * problem.softmax_scale


def dot(problem, a, b):
    """a @ b, summed in float32; operands of float32 are rounded to tf32 only where the problem allows it."""
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=problem.precision, preferred_element_type=jnp.float32)


def query_dot(problem, q, tile):
    """q @ tile for rows of queries, or of cotangents, beside a tile of the cache that may be quantised."""
    return dot(problem, q, widened(tile, q.dtype))


def value_dot(problem, p, v, scale=None):
    """(p * scale) @ v for probabilities p of at most 1, summed in float32."""
    # A result that is not rounded either goes on to be subtracted from others, as in delta.
    product = fine_dot if problem.keeps_accum_dtype else lambda problem, p, v: dot(problem, p.astype(v.dtype), v)
    # float16 holds every number of 8 bits, and p more finely than bfloat16 does.
    v = widened(v, jnp.float16) if problem.quantised and problem.dtype != jnp.float32 else v.astype(problem.dtype)
    if scale is None:
        return product(problem, p, v)
    # Relative to the tile's largest scale: a single key then weighs exactly 1, and nothing leaves the range.
    largest = jnp.max(jnp.abs(scale))
    largest = jnp.where(largest > 0, largest, 1.0)
    return product(problem, p * (scale / largest)[None, :], v) * largest


def key_dot(problem, d_x, k, scale=None):
    """(d_x * scale) @ k for gradients d_x of any size, summed in float32.

    A row of d_x sums up to 0, and so what all keys share does not count. Were d_x rounded to 16 bits, it would.
    """
    d_x = d_x if scale is None else d_x * scale[None, :]
    k = widened(k, problem.dtype)
    if problem.dtype != jnp.float16:
        return fine_dot(problem, d_x, k)
    # Relative to each row's largest: nothing leaves the range, nor do small ones lose bits.
    least = float(jnp.finfo(jnp.float16).smallest_subnormal)
    largest = jnp.maximum(jnp.max(jnp.abs(d_x), axis=1), least)[:, None]
    return fine_dot(problem, d_x * (1 / largest), k) * largest


def fine_dot(problem, a, b):
    """a @ b, where b is of 16 bits and a is not: two products, of a rounded, and of what rounding took away."""
    rounded = a.astype(b.dtype)
    if a.dtype == b.dtype:
        return dot(problem, a, b)
    rest = (a - rounded.astype(a.dtype)).astype(b.dtype)
    return dot(problem, rounded, b) + dot(problem, rest, b)


def widened(tile, dtype):
    """A tile of the cache as `dtype`, which holds all of its numbers."""
    if tile.dtype == jnp.float8_e4m3fn and dtype == jnp.bfloat16:
        # By way of these an instruction takes two numbers; straight to bfloat16 each one passes through a slow unit.
        tile = tile.astype(jnp.float16).astype(jnp.float32)
    return tile.astype(dtype)
