"""Pages with reference counts: one number space, many tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor


class PagePool:
    """Pages of one number space: page n is row n of every tensor of the pool.

    Pages are counted by their holders, so that caches share what they have in common; a page with several holders is
    copied before one of them writes to it. Tensors grow by half when no page is free, and never shrink. Memory starts
    as zeros: rows nobody has written yet are finite.

    Args:
        makers: one function a tensor, number of pages -> zeroed tensor [pages, ...].
    """

    def __init__(self, makers: Iterable[Callable[[int], Tensor]]):
        self._makers = list(makers)
        self.tensors = [make(0) for make in self._makers]
        self._holders: list[int] = []
        self._free: list[int] = []
        self.version = 0  # changes when the tensors do

    @property
    def capacity(self) -> int:
        """Pages there is memory for."""
        return len(self._holders)

    @property
    def used(self) -> int:
        """Pages that have a holder."""
        return len(self._holders) - len(self._free)

    def reserve(self, count: int, limit: int = 0) -> None:
        """Makes sure that `count` pages can be taken. Growth stops at `limit` pages unless more are needed."""
        missing = count - len(self._free)
        if missing <= 0:
            return
        old = self.capacity
        total = max(old + missing, min(old + old // 2, max(limit, old)))
        # One by one, each replacing its predecessor, so that memory never holds more than one of them twice.
        self.version += 1
        for index, make in enumerate(self._makers):
            larger = make(total)
            larger[:old].copy_(self.tensors[index][:old])
            self.tensors[index] = larger
        self._holders.extend([0] * (total - old))
        self._free[:0] = range(total - 1, old - 1, -1)

    def take(self) -> int:
        """A page for one holder, with whatever its memory held."""
        if not self._free:
            self.reserve(1)
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def shared(self, page: int) -> bool:
        return self._holders[page] > 1

    def hold(self, pages: Iterable[int]) -> None:
        """Counts one more holder of each page."""
        for page in pages:
            self._holders[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """Counts one holder less of each page; pages without any become free."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)

    def copy(self, page: int) -> int:
        """A page for one holder that holds what this one does."""
        copy = self.take()
        for tensor in self.tensors:
            tensor[copy].copy_(tensor[page])
        return copy
