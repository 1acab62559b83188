"""Where a tile of rows of a sequence is in the cache: in a padded array, or in pages.

There is one way to find a row: the numbers of a tile's pages are looked up one tile ahead (`look_up`) and carried by the loop.
Triton keeps loads in flight only where no load has to wait for the address of another load in the same round. A padded cache is the
page that is the sequence, which needs no look-up.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu


@dataclasses.dataclass(frozen=True)
class Rows:
    """How tiles of `block_keys` rows are found.

    Attributes:
        table_ref: int32 [B, P], or None for a padded cache.
        start_ref: int32 [B], the first rows of the ranges, or None.
        num_pages: pages of the pool.
        page_size: rows per page.
        block_keys: rows per tile.
        anywhere: whether tiles begin where ranges do, as they do in a padded cache, so that sums have the same order and bits.
    """

    table_ref: Any
    start_ref: Any
    num_pages: Any
    page_size: Any
    block_keys: int
    anywhere: bool

    @classmethod
    def of(cls, problem, block_keys, table_ref, start_ref) -> "Rows":
        anywhere = problem.fwd_params.num_key_splits is not None
        return cls(table_ref, start_ref, problem.num_pages, problem.page_size, block_keys, anywhere)

    @property
    def align(self) -> int:
        """Tiles begin at multiples of so many rows, and then have one page, or whole pages."""
        if self.page_size is None or self.anywhere:
            return 1
        small, large = sorted((self.page_size, self.block_keys))
        return small if large % small == 0 else 1

    @property
    def pages_of_tile(self) -> int:
        """How many numbers are looked up per tile."""
        if self.page_size is None:
            return 0
        if self.align == 1:  # pages of one row, or of a size that fits no tile: a number for each row
            return self.block_keys
        return max(self.block_keys // self.page_size, 1)

    def look_up(self, b, key):
        """What must be known of the tile of sequence `b` that begins with row `key`: nothing of a padded cache, else the numbers of
        its pages, one or [pages_of_tile], and, where tiles may begin before the range does, the range's first row.

        What is not in the pool, or beyond the table, is clipped: no token sees a row there. Clipped here, not where the numbers are
        used a round later: then the loop waited longer (pages of 64, full: 1.12 of a padded cache in place of 1.06).
        """
        if self.page_size is None:
            return ()
        last = self.table_ref.shape[1] - 1
        if self.pages_of_tile == 1:
            page = self.table_ref[b, jnp.minimum(key // self.page_size, last)]
        else:
            numbers = jnp.arange(self.pages_of_tile, dtype=jnp.int32)
            numbers = key // self.page_size + numbers if self.align > 1 else (key + numbers) // self.page_size
            page = plgpu.load(self.table_ref.at[b, jnp.minimum(numbers, last)])
        start = () if self.align == 1 or self.start_ref is None else (self.start_ref[b],)
        return jnp.clip(page, 0, self.num_pages - 1), *start

    def live(self, keys, end, found):
        """Which keys of a tile are in the range, whose piece ends at `end`."""
        live = keys < end
        for start in found[1:]:
            live = live & (keys >= start)
        return live

    def place(self, b, key, found):
        """Page, or pages [block_keys], of the tile's rows, and the rows in them, [block_keys]."""
        offsets = jnp.arange(self.block_keys, dtype=jnp.int32)
        if self.page_size is None:
            return b, key + offsets
        page = found[0]
        if self.pages_of_tile == 1:
            return page, key % self.page_size + offsets
        if self.align > 1:
            shape = self.pages_of_tile, self.page_size
            return jnp.broadcast_to(page[:, None], shape).reshape(self.block_keys), offsets % self.page_size
        return page, (key + offsets) % self.page_size
