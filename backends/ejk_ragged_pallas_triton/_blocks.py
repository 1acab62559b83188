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
    """The rows of queries that a program works on, each a token and a head of one kv head, and the dimensions of a head; with masks
    for the padding. Arrays with a row for each token and head have one axis for both here, [B, T * Hq, ...].

    Attributes:
        kv_head: number of the kv head.
        tokens: numbers of the tokens, [block_rows]; 0 where there is one only.
        places, ok: where the rows stand among all T * Hq, [block_rows].
        dims, dims_ok: numbers of the dimensions, [block_dim].
        padded: whether `dims` goes beyond head_dim.
    """

    kv_head: Any
    tokens: Any
    places: Any
    ok: Any
    dims: Any
    dims_ok: Any
    padded: bool

    @classmethod
    def of(cls, kv_head, row_block, problem, tiles) -> "Block":
        rows = row_block * tiles.block_rows + jnp.arange(tiles.block_rows, dtype=jnp.int32)
        ok = rows < problem.num_tokens * problem.group
        tokens, in_group = (0, rows) if problem.num_tokens == 1 else (rows // problem.group, rows % problem.group)
        dims = jnp.arange(tiles.block_dim, dtype=jnp.int32)
        places = tokens * problem.num_q_heads + kv_head * problem.group + in_group
        return cls(kv_head, tokens, places, ok, dims, dims < problem.head_dim, tiles.block_dim > problem.head_dim)

    def of_query(self, ref, b):
        """Where an array like the query holds this block of sequence `b`, and the mask; [block_rows, block_dim]."""
        return ref.at[b, self.places[:, None], self.dims[None, :]], self.ok[:, None] & self.dims_ok[None, :]

    def of_row(self, ref, b):
        """Where an array of one number a row holds this block of sequence `b`, and the mask; [block_rows]."""
        return ref.at[b, self.places], self.ok

    def of_cache(self, ref, b, keys, live):
        """Where an array like the cache holds `keys` of sequence `b`, and the mask; [keys, block_dim].

        Keys that are not live are masked, so that they are not even read, and what they hold can't matter.
        """
        mask = live[:, None] & self.dims_ok[None, :] if self.padded else live[:, None]
        return ref.at[b, keys[:, None], self.kv_head, self.dims[None, :]], mask

    def scales(self, ref, b, keys, live):
        """The scales of `keys` of sequence `b`, [keys]; None without a ref, or where all keys have the same."""
        if ref is None or ref.shape[2] == 1:
            return None
        return load((ref.at[*self._of_scale(ref, b), keys], live))

    def common_scale(self, ref, b):
        """The scale that all keys of sequence `b` have; 1 where there is no such thing."""
        if ref is None or ref.shape[2] > 1:
            return 1.0
        return ref[*self._of_scale(ref, b), 0]

    def _of_scale(self, ref, b):
        """Whose scale: the sequence and the head, 0 where all have the same."""
        return [number if size > 1 else 0 for number, size in zip((b, self.kv_head), ref.shape[:2], strict=True)]

    def sees(self, lengths, b, keys, end):
        """Which keys of a piece that ends at `end` each row sees, [block_rows, keys], or [1, keys] where all see the same."""
        if (ref := lengths.get("token_end")) is None:
            mask = keys[None, :] < end
        else:
            mask = keys[None, :] < jnp.minimum(load((ref.at[b, self.tokens], self.ok)), end)[:, None]
        if (ref := lengths.get("token_start")) is not None:
            mask = mask & (keys[None, :] >= load((ref.at[b, self.tokens], self.ok))[:, None])
        return mask

    @staticmethod
    def cleaned(sees, tile, scale=None):
        """A tile of the cache and its scales, 0 at keys that no row sees."""
        seen = jnp.max(sees.astype(jnp.int32), axis=0) > 0
        tile = jnp.where(seen[:, None], tile, jnp.zeros((), tile.dtype))
        return tile, scale if scale is None else jnp.where(seen, scale, 0.0)


def line_of(schedule, program, start_ref, end_ref):
    """The line on which `program` works, in strips; a ref of lengths may be None."""

    def lengths(number):
        there = number < schedule.batch
        return number, *(None if ref is None else load((ref.at[number], there)) for ref in (start_ref, end_ref))

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
    product = fine_dot if problem.partial else lambda problem, p, v: dot(problem, p.astype(v.dtype), v)
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
