"""What the kernels share: which heads and dimensions a program holds, products, and logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


LOG2_E = math.log2(math.e)
LOWEST = float(jnp.finfo(jnp.float32).min)  # stands in for -inf where a difference of two must not be NaN


@dataclasses.dataclass(frozen=True)
class Block:
    """The query heads of one kv head that a program works on, and the dimensions of a head; with masks for the padding.

    Attributes:
        kv_head: number of the kv head.
        heads, heads_ok: numbers of the query heads, [block_heads].
        dims, dims_ok: numbers of the dimensions, [block_dim].
        padded: whether `dims` goes beyond head_dim.
    """

    kv_head: jax.Array
    heads: jax.Array
    heads_ok: jax.Array
    dims: jax.Array
    dims_ok: jax.Array
    padded: bool

    @classmethod
    def of(cls, program, problem, tiles) -> "Block":
        kv_head, head_block = program // tiles.head_blocks, program % tiles.head_blocks
        in_group = head_block * tiles.block_heads + jnp.arange(tiles.block_heads, dtype=jnp.int32)
        dims = jnp.arange(tiles.block_dim, dtype=jnp.int32)
        heads = kv_head * problem.group + in_group
        return cls(kv_head, heads, in_group < problem.group, dims, dims < problem.head_dim, tiles.block_dim > problem.head_dim)

    def of_query(self, ref, b):
        """Where an array like the query holds this block of sequence `b`, and the mask; [block_heads, block_dim]."""
        return ref.at[b, self.heads[:, None], self.dims[None, :]], self.heads_ok[:, None] & self.dims_ok[None, :]

    def of_cache(self, ref, b, rows, live):
        """Where an array like the cache holds `rows` of sequence `b`, and the mask; [rows, block_dim].

        Rows that are not live are masked, so that they are not even read, and what they hold can't matter.
        """
        mask = live[:, None] & self.dims_ok[None, :] if self.padded else live[:, None]
        return ref.at[b, rows[:, None], self.kv_head, self.dims[None, :]], mask


def load(where):
    """What stands at a place and mask; zeros where masked."""
    ref, mask = where
    return plgpu.load(ref, mask=mask, other=0.0)


def store(where, values):
    ref, mask = where
    plgpu.store(ref, values.astype(ref.dtype), mask=mask)


def logits(problem, products):
    """Base-2 logits of the products q . k: scaled, then capped. (`exp2` is one instruction; log2(e) rides on the scale.)"""
    if problem.logits_soft_cap is None:
        return products * (problem.softmax_scale * LOG2_E)
    return jnp.tanh(products * (problem.softmax_scale / problem.logits_soft_cap)) * (problem.logits_soft_cap * LOG2_E)


def logits_slope(problem, base2_logits):
    """Derivative of the natural logits by the products q . k."""
    if problem.logits_soft_cap is None:
        return problem.softmax_scale
    tanh = base2_logits * (1 / (problem.logits_soft_cap * LOG2_E))
    return (1 - tanh * tanh) * problem.softmax_scale


def dot(problem, a, b):
    """a @ b, summed in float32; float32 operands are not rounded to tf32 unless `jax.default_matmul_precision` allows it."""
    exact = problem.matmul_precision in (None, "highest", "float32")
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


WHOLE = pl.BlockSpec(memory_space=pl.ANY)  # arrays stay where they are; kernels index them
