"""The softmax of tiles of logits, where query rows are the rows of the products: from products q . k to weights of the values."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ._jax import LOWEST, OF_ROWS
from ._line import Piece
from ._program import LOG2_E, of_rows, over, over_rows, Program, tile_of
from ._reference import any_in_warp, GROWTH
from ._widen import LEAST_UNIT


# The reference has the weight 2 ** FLOAT16_WEIGHTS in place of 1 in float16, so that weights next to nothing keep their accuracy.
# No weight reaches 2 ** 16.
FLOAT16_WEIGHTS = 15 - GROWTH
TOTALS = 8  # sums of weights per query row, which are added up at the end


class Change(NamedTuple):
    """A change of the references, by one tile.

    Attributes:
        happens: 1 or 0, whether there is any in this warp.
        fade: the factor of each query row for its sums so far.
    """

    happens: Any
    fade: Any

    def of(self, sums):
        """Sums so far [query rows, columns], relative to the new references."""
        return lax.cond(self.happens > 0, lambda x: x * over(self.fade, x), lambda x: x, sums)


@dataclasses.dataclass(frozen=True)
class Softmax:
    """The softmax of some query rows over the tiles of a piece.

    `stats` go from tile to tile: the reference of the weights [query rows], a logit without its factor, and sums of weights
    [query rows, TOTALS]. If rows have value scales of their own, `stats` also have the unit of the output: values of 8 bits were
    multiplied by their scales in this unit, which grows from tile to tile.

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
        return [of_rows(self.query_rows.size, LOWEST), tile_of((self.query_rows.size, TOTALS), 0)]

    def unit(self):
        """The unit of the output before the first tile, where rows have value scales of their own."""
        return [jnp.float32(LEAST_UNIT)] if self.program.by_row("v") else []

    def tile(self, first, row, products, stats, key_scale: Any = None, weight_scale: Any = None, new_unit: Any = None):
        """Weights of a tile, the new `stats`, and the `Change` that is left to do for the output so far.

        Args:
            first: the first row whose turn it is.
            row: the row at which the tile was read. Rows before `first` had their turn.
            products: q . k, [query rows, keys].
            key_scale: one number per row of the tile [keys], one number, or None.
            weight_scale: what multiplies the weights, one number per row of the tile [keys], or None.
            new_unit: the unit of the tile's values, where rows have value scales of their own, or None.
        """
        program, piece = self.program, self.piece
        reference, totals, *unit = stats
        if key_scale is not None:
            products = products * (over_rows(key_scale, products) if key_scale.ndim else key_scale)
        x, factor = products if program.factor != 1 else program.logits(products), program.factor
        (x,) = program.masked(piece, first, [row], self.bounds, self.seen_by_all, [x], 1)
        largest, growth = _folded(jnp.maximum, x), min(GROWTH / factor, -LOWEST)

        def renew(totals):
            most = jnp.max(largest, axis=1)
            new = jnp.where(most - reference > growth, most, reference)
            fade = jnp.exp2((reference - new) * factor)
            return new, totals * over(fade, totals), fade

        keep = lambda totals: (reference, totals, of_rows(reference.size, 1))
        happens = any_in_warp(largest - over(reference, largest), growth, program.interpreted)
        reference, totals, fade = lax.cond(happens > 0, renew, keep, totals)
        exponent = (x - over(reference, x)) * factor
        p = jnp.exp2(exponent + self.shift if self.shift else exponent)
        stats = [reference, totals + _folded(jnp.add, p)]
        if weight_scale is not None:
            p = p * over_rows(weight_scale, p)
        if unit:
            fade = fade * (unit[0] / new_unit)
            happens = jnp.where(unit[0] != new_unit, 1, happens)
            stats.append(new_unit)
        return list(program.terms(p)), stats, Change(happens, fade)

    def results(self, acc, reference, totals, *unit):
        """The sums of the output, the reference, and the sum of the weights, of `stats` and of sums in the units of weights and
        values."""
        program, total = self.program, jnp.sum(totals, axis=1)
        scale = program.scale_of(self.piece, "v")
        if unit:
            scale = unit[0] * 2.0**-program.headroom if program.plan.scales_values else unit[0]
        if not self.shift:
            return acc if scale is None else acc * scale, reference, total
        weight = 2.0**-self.shift  # before it meets `acc`, so that no product leaves the range
        return acc * (weight if scale is None else scale * weight), reference, total * weight

    @property
    def shift(self) -> int:
        """The base-2 logarithm of the weight of the reference."""
        return FLOAT16_WEIGHTS if self.program.plan.wide_stages else 0

    def natural(self, reference):
        """The reference with its factor, as results have it."""
        return jnp.maximum(reference * (self.program.factor / LOG2_E), LOWEST)


def _folded(operation, x):
    """A matrix, folded to TOTALS columns: a thread folds what it has of each row."""
    return functools.reduce(operation, [x[:, first : first + TOTALS] for first in range(0, x.shape[1], TOTALS)])
