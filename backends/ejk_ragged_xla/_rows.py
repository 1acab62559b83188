"""Finds and reads the rows of a sequence, in chunks. A chunk is a slice of one page, or several whole pages.

A padded cache counts as one page per sequence. So one way to find a row serves both, and one way to go from chunk to chunk.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import min_dim


def held(cache, maps):
    """The arrays of the cache in the shapes in which loops hold them: most likely the shapes in which the caller holds them.

    XLA's CPU compiler copies a cache that a program writes in one shape and a loop takes in another shape. So the axes `maps` of
    `vmap` are split off the first axis. Axes of size 1, except the first axis, are removed, because a caller adds such axes to pass
    one sequence or one kv head, or to reshape a pool. The first axis stays, because it is part of a cache of one sequence.
    """

    def one(x):
        x = x.reshape(*maps, -1, *x.shape[1:])
        return lax.squeeze(x, [axis for axis, size in enumerate(x.shape) if axis and size == 1])

    return jax.tree.map(one, cache)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads chunks of `rows` rows of a sequence.

    Attributes:
        problem: the static facts.
        pages: int32 [B, P], the numbers of the pages of every sequence. None for a padded cache.
        rows: number of rows per chunk: at most the rows of a page, or the rows of several whole pages.
    """

    problem: Any
    pages: Any
    rows: Any

    @classmethod
    def of(cls, problem, pages, rows) -> "Reader":
        """A reader of chunks of at most `rows` rows."""
        whole = problem.paged and problem.page_size < rows
        return cls(
            problem,
            pages,
            rows // problem.page_size * problem.page_size if whole else min_dim(rows, problem.page_size or problem.seq_len),
        )

    @property
    def whole_pages(self) -> bool:
        """Whether a chunk is several whole pages."""
        return self.problem.paged and self.rows > self.problem.page_size

    def first(self, row):
        """The row at which the first chunk begins. `row` is the first live row."""
        return row // self.problem.page_size * self.problem.page_size if self.whole_pages else row

    def next(self, row):
        """The row at which the next chunk begins, after the chunk at `row`."""
        if self.whole_pages or not self.problem.paged:
            return row + self.rows
        return jnp.minimum(row + self.rows, (row // self.problem.page_size + 1) * self.problem.page_size)

    def place(self, row):
        """The row from which the chunk at `row` is read. If the chunk would exceed its page, it is read from further back."""
        if self.whole_pages:
            return row
        if not self.problem.paged:
            return jnp.clip(row, 0, self.problem.seq_len - self.rows)  # slices and updates of slices clip in the same way
        in_page = row % self.problem.page_size
        return row - in_page + jnp.minimum(in_page, self.problem.page_size - self.rows)

    def slices(self, array, b, place, heads, axis):
        """The chunk at `place` of an array [N, ...], without the first axis, for some kv heads.

        The array has rows along `axis`, which is 1 or 2, and kv heads along the other of these axes. An axis of size 1 stays.
        """
        heads_axis = 3 - axis
        if self.whole_pages and array.shape[0] != 1:
            return self._whole_pages(array, b, place, heads, axis)
        alike = [size == 1 for size in array.shape]
        page, row = self._page(b, place)
        at, sizes = [jnp.int32(0)] * array.ndim, list(array.shape)
        at[0], sizes[0] = page, 1
        at[axis], sizes[axis] = row, self.problem.page_size if self.whole_pages else self.rows
        at[heads_axis], sizes[heads_axis] = jnp.int32(heads.start), len(heads)
        for i in range(3):
            if alike[i]:
                at[i], sizes[i] = jnp.int32(0), 1
        return lax.dynamic_slice(array, at, sizes)[0]

    def _page(self, b, place):
        """The number of the page that holds row `place`, and the row within the page."""
        if not self.problem.paged:
            return b, place
        return self.pages[b, place // self.problem.page_size], place % self.problem.page_size

    def _whole_pages(self, array, b, place, heads, axis):
        """`slices` for chunks of several whole pages."""
        size = self.problem.page_size
        numbers = place // size + jnp.arange(self.rows // size, dtype=jnp.int32)
        pages = self.pages[b, jnp.minimum(numbers, self.pages.shape[1] - 1)]  # rows beyond the last page are not live
        if array.shape[3 - axis] > 1:
            array = lax.slice_in_dim(array, heads.start, heads.stop, axis=3 - axis)
        chunk = jnp.moveaxis(array[pages], axis, 1)  # [pages, rows of a page, ...]
        chunk = jnp.broadcast_to(chunk, (chunk.shape[0], size, *chunk.shape[2:])).reshape(self.rows, *chunk.shape[2:])
        return jnp.moveaxis(chunk, 0, axis - 1)
