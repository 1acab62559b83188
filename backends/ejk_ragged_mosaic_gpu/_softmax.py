"""The softmax of tiles of logits, where query rows are the rows of the products: from products q . k to weights of the values."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ._jax import LOWEST, OF_ROWS
from ._line import Piece
from ._program import LOG2_E, of_rows, over, over_rows, Program
from ._widen import LEAST_UNIT


# Weights of float16 are relative to 2 ** 15 in place of 1, so that those next to nothing keep their accuracy.
FLOAT16_WEIGHTS = 15


@dataclasses.dataclass(frozen=True)
class Softmax:
    """The softmax of some query rows over the tiles of a piece.

    `stats` go from tile to tile: the largest logit without its factor, and the sum of weights, [query rows] each. If rows have
    value scales of their own, `stats` also have the unit of the output: values of 8 bits were multiplied by their scales in this
    unit, which grows from tile to tile.

    Attributes:
        program, piece: whose tiles.
        query_rows: the query rows, a slice of those of the kv head.
        bounds: first rows and ends, int32 [query rows] or None each.
        seen_by_all: first row and end of what all query rows see. Only tiles beyond need a mask.
    """

    program: Program
    piece: Piece
    query_rows: Any
    bounds: Any
    seen_by_all: Any

    @classmethod
    def of(cls, program: Program, piece: Piece, query_rows) -> "Softmax":
        """With the bounds of the query rows, as each program finds them from those of the tokens."""
        return cls(program, piece, query_rows, *program.bounds(piece, query_rows, OF_ROWS))

    def nothing(self):
        """`stats` before the first tile, but for the unit of the output."""
        return [of_rows(self.query_rows.size, LOWEST), of_rows(self.query_rows.size, 0)]

    def unit(self):
        """The unit of the output before the first tile, where rows have value scales of their own."""
        return [jnp.float32(LEAST_UNIT)] if self.program.by_row("v") else []

    def tile(self, first, row, products, stats, key_scale: Any = None, weight_scale: Any = None, new_unit: Any = None):
        """Weights of a tile, the new `stats`, and the factor by which this tile shrinks the output so far.

        Args:
            first: the first row whose turn it is.
            row: the row at which the tile was read. Rows before `first` had their turn.
            products: q . k, [query rows, keys].
            key_scale: one number per row of the tile [keys], one number, or None.
            weight_scale: what multiplies the weights, one number per row of the tile [keys], or None.
            new_unit: the unit of the tile's values, where rows have value scales of their own, or None.
        """
        program, piece = self.program, self.piece
        high, total, *unit = stats
        if key_scale is not None:
            products = products * (over_rows(key_scale, products) if key_scale.ndim else key_scale)
        x, factor = products if program.factor != 1 else program.logits(products), program.factor
        (x,) = program.masked(piece, first, [row], self.bounds, self.seen_by_all, [x], 1)
        new_high = jnp.maximum(jnp.maximum(high, jnp.max(x, axis=1)), LOWEST)
        fade = jnp.exp2((high - new_high) * factor)
        exponent = (x - over(new_high, x)) * factor
        p = jnp.exp2(exponent + self.shift if self.shift else exponent)
        stats = [new_high, total * fade + jnp.sum(p, axis=1)]
        if weight_scale is not None:
            p = p * over_rows(weight_scale, p)
        if unit:
            fade = fade * (unit[0] / new_unit)
            stats.append(new_unit)
        return list(program.terms(p)), stats, fade

    def results(self, acc, high, total, *unit):
        """The sums of the output, the largest logit, and the sum of the weights, of `stats` and of sums in the units of weights and
        values."""
        program = self.program
        scale = program.scale_of(self.piece, "v")
        if unit:
            scale = unit[0] * 2.0**-program.headroom if program.plan.scales_values else unit[0]
        if not self.shift:
            return acc if scale is None else acc * scale, high, total
        weight = 2.0**-self.shift  # before it meets `acc`, so that no product leaves the range
        return acc * (weight if scale is None else scale * weight), high, total * weight

    @property
    def shift(self) -> int:
        """The base-2 logarithm of the largest weight."""
        return FLOAT16_WEIGHTS if self.program.plan.wide_stages else 0

    def natural(self, high):
        """The largest logit with its factor, as results have it."""
        return jnp.maximum(high * (self.program.factor / LOG2_E), LOWEST)
