"""A head's dimensions in parts: tiles are powers of two wide, and 576 is 512 + 64, 192 is 128 + 64, 80 is 64 + 16."""

import dataclasses

import jax.numpy as jnp


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
        """The parts of a head of `dim` dimensions, the largest first."""
        parts, first = [], 0
        while first < dim:
            size = max(1 << ((dim - first).bit_length() - 1), 16)
            parts.append(cls(first, size, dim))
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
