"""Finds a tile of rows of a sequence in the cache, which is padded or in pages.

The numbers of a tile's pages are looked up one tile ahead (`look_up`), and the loop carries them. Triton keeps loads in flight only
if no load has to wait for the address from another load in the same iteration. A padded cache has one page per sequence, and needs
no look-up.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu


@dataclasses.dataclass(frozen=True)
class Rows:
    """Finds tiles of `block_keys` rows.

    Attributes:
        table_ref: the page table, int32 [B, P], or None for a padded cache.
        start_ref: the first rows of the ranges, int32 [B], or None.
        num_pages: number of pages of the pool.
        page_size: number of rows per page, or None for a padded cache.
        block_keys: number of rows per tile.
        anywhere: whether tiles in pages begin at the first row of the range, as tiles of a padded cache do. Sums then have the same
            order and the same bits as for a padded cache.
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
        """Tiles begin at multiples of this number of rows. If it is above 1, a tile lies in one page or is several whole pages."""
        if self.page_size is None or self.anywhere:
            return 1
        small, large = sorted((self.page_size, self.block_keys))
        return small if large % small == 0 else 1

    @property
    def pages_of_tile(self) -> int:
        """How many numbers of pages are looked up per tile."""
        if self.page_size is None:
            return 0
        if self.align == 1:  # one number per row: pages have one row, or tiles and pages do not line up
            return self.block_keys
        return max(self.block_keys // self.page_size, 1)

    def look_up(self, b, key):
        """Looks up the tile of sequence `b` that begins at row `key`.

        Entries outside the pool or the table are clipped, because no token sees a row there. They are clipped here and not one
        iteration later, where they are used, because the loop then waited longer: with full pages of 64 rows, a call took 1.12
        times the time of a padded cache, and now takes 1.06 times.

        Returns:
            () for a padded cache. Otherwise the number of the tile's page, or the numbers of its pages [pages_of_tile]. If the tile
            may begin before the range, also the range's first row.
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
        """Which keys of a tile are in the range. `end` is the end of the piece, and `found` comes from `look_up`."""
        live = keys < end
        for start in found[1:]:
            live = live & (keys >= start)
        return live

    def place(self, b, key, found):
        """The place of the tile's rows: their page, or one page per row [block_keys], and the rows within pages [block_keys]."""
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
