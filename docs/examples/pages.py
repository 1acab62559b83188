"""An allocator of pages: a list of the free pages, and for every other page the number of sequences that hold it.

A sequence has a list of its pages, in the order of its rows. Sequences that begin alike hold the same pages for the beginning. A
page with several holders is copied before a sequence writes into it. This file knows nothing of arrays: the caller copies.
"""

from collections.abc import Callable


class Pages:
    """The pages 0 to `count - 1`, of `size` rows each, all free at first."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self.free = list(range(count))
        self.holders = [0] * count

    def of(self, rows: int) -> int:
        """How many pages `rows` rows need."""
        return -(-rows // self.size)

    def share(self, held: list[int], rows: int) -> list[int]:
        """The pages of the first `rows` rows of a sequence that holds `held`, for another sequence that begins with these rows."""
        shared = held[: self.of(rows)]
        for page in shared:
            self.holders[page] += 1
        return shared

    def provide(self, held: list[int], first: int, end: int, copy: Callable[[int, int], None], spare: int = 0) -> bool:
        """Makes rows `first` to `end - 1` of a sequence writable. The rows before `first` stay as they are.

        Appends the missing pages to `held`. If another sequence holds the page of row `first` too, a new page takes its place, and
        `copy(page, new)` is called to copy the rows. Returns False, and changes nothing, if fewer than `spare` pages would be left.
        """
        at = first // self.size
        shared = at < len(held) and self.holders[held[at]] > 1
        missing = max(self.of(end) - len(held), 0)
        if shared + missing + spare > len(self.free):
            return False
        if shared:
            page, held[at] = held[at], self._take()
            self._drop(page)
            copy(page, held[at])
        held.extend(self._take() for _ in range(missing))
        return True

    def release(self, held: list[int]) -> None:
        """Gives back all pages of a sequence. A page is free again when its last holder gives it back."""
        for page in held:
            self._drop(page)
        held.clear()

    def _take(self) -> int:
        page = self.free.pop()
        self.holders[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self.holders[page] -= 1
        if self.holders[page] == 0:
            self.free.append(page)
