"""A head's dimensions in parts: tiles are powers of two wide, and 576 is 512 + 64, 192 is 128 + 64, 96 is 64 + 32."""

import dataclasses

import jax.numpy as jnp


LEAST = 32  # dimensions of a part beside another


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a head's dimensions: tiles are powers of two wide, and a head that is not is walked over in parts.

    Attributes:
        first: number of the first dimension.
        size: dimensions, a power of two, 16 at least.
        limit: dimensions of the head; the last part may go beyond.
    """

    first: int
    size: int
    limit: int

    @classmethod
    def of(cls, dim: int) -> "tuple[Part, ...]":
        """The parts of a head of `dim` dimensions, the largest first.

        No part is smaller than 32 beside another: such tiles cost more than the padding that they spare. (On an H100, a head of
        80 dimensions takes 1.3 times as long in 64 + 16 as in 128.)
        """
        parts, first = [], 0
        while first < dim:
            rest = dim - first
            size = 1 << (rest.bit_length() - 1)
            if (rest - size) % LEAST:
                size = 1 << (rest - 1).bit_length()
            parts.append(cls(first, max(size, 16), dim))
            first += size
        return tuple(parts)

    @property
    def dims(self):
        """Numbers of the dimensions, [size]."""
        return self.first + jnp.arange(self.size, dtype=jnp.int32)

    def masked(self, ok):
        """A mask [rows, size] of rows `ok`, [rows]; [rows, 1] where no dimension is beyond the head."""
        if self.first + self.size <= self.limit:
            return ok[:, None]
        return ok[:, None] & (self.dims < self.limit)[None, :]
