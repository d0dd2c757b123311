"""A page allocator for workers that own their page tables. Pure bookkeeping: it never talks to the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from attnd.errors import Exhausted, InvalidRequest


class PagePool:
    """The pages of one cache: which are free, and how many sequences hold each of the others.

    Not thread-safe. Every operation is all-or-nothing: one that raises has changed nothing.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        """A pool in which all pages are free.

        Args:
            num_pages: pages of the cache, at least 1.
            page_size: token slots per page, at least 1.

        Raises:
            InvalidRequest: a size is less than 1.
        """
        for field, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise InvalidRequest(f"{field} is {value}, but must be at least 1", field=field)
        self.num_pages = num_pages
        self.page_size = page_size
        self._references = [0] * num_pages
        # A stack, lowest id on top: the page freed last is used first, so few pages are ever written.
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - len(self._free)

    def references(self, page: int) -> int:
        """How many hold `page`; 0 is free."""
        return self._references[self._checked(page)]

    def alloc(self, num_pages: int) -> list[int]:
        """Takes free pages, with one reference each.

        Raises:
            Exhausted: fewer pages are free.
            InvalidRequest: `num_pages` is negative.
        """
        if num_pages < 0:
            raise InvalidRequest(f"num_pages is {num_pages}, but must be at least 0", field="num_pages")
        if num_pages > self.num_free:
            raise Exhausted(
                f"num_pages is {num_pages}, but of {self.num_pages} pages {self.num_used} are used and "
                f"{self.num_free} free",
                field="num_pages",
            )
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds a reference to each of `pages`, which must be in use.

        Raises:
            InvalidRequest: a page is free, or not of this pool.
        """
        pages = list(pages)
        for page in pages:
            if not self.references(page):
                raise InvalidRequest(f"page {page} is free, but must be in use to be shared", field="pages")
        for page in pages:
            self._references[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Drops a reference to each of `pages`; one without references is free again.

        Raises:
            InvalidRequest: a page has fewer references than are dropped, or is not of this pool.
        """
        pages = list(pages)
        for page, dropped in Counter(pages).items():
            held = self.references(page)
            if held < dropped:
                raise InvalidRequest(f"page {page} is freed {dropped} times, but has {held} references", field="pages")
        for page in pages:
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def check(self) -> None:
        """Verifies that every page is either free or referenced, and never both.

        Raises:
            RuntimeError: it is not so: a bug of this module.
        """
        unused = [page for page, count in enumerate(self._references) if count == 0]
        if sorted(self._free) != unused or min(self._references) < 0:
            raise RuntimeError(f"pages {sorted(self._free)} are listed as free, but pages {unused} have no references")

    def _checked(self, page: int) -> int:
        if not 0 <= page < self.num_pages:
            raise InvalidRequest(f"page is {page}, but the cache has pages 0..{self.num_pages - 1}", field="pages")
        return page


class PagedSequence:
    """The tokens of one request and the pages they lie in: token `i` in page `pages[i // page_size]`.

    Every page that has room for another token belongs to this sequence alone, so that storing a token never touches
    another sequence. `fork` and `truncate` uphold it by replacing a page, and return the copies to be made as
    `(source, target)` pages. Hand them to `cache.copy_pages` before anything else is stored or freed.

    Attributes:
        length: tokens of the sequence.
        pages: its pages, in order; a row of `page_tables`.
    """

    def __init__(self, pool: PagePool) -> None:
        """An empty sequence that takes its pages from `pool`."""
        self.length = 0
        self.pages: list[int] = []
        self._pool = pool

    def slots(self, start: int, end: int) -> list[int]:
        """Slots of the tokens `[start, end)`, which must lie in the sequence's pages."""
        size, pages = self._pool.page_size, self.pages
        return [pages[token // size] * size + token % size for token in range(start, end)]

    def extend(self, num_tokens: int) -> list[int]:
        """Adds tokens, and pages where they need some.

        Returns:
            Slots of the new tokens, in order: their part of `slot_mapping`.

        Raises:
            Exhausted: the pool has too few free pages.
            InvalidRequest: `num_tokens` is negative.
        """
        if num_tokens < 0:
            raise InvalidRequest(f"num_tokens is {num_tokens}, but must be at least 0", field="num_tokens")
        start, end = self.length, self.length + num_tokens
        self.pages += self._pool.alloc(self._num_pages(end) - len(self.pages))
        self.length = end
        return self.slots(start, end)

    def truncate(self, length: int) -> list[tuple[int, int]]:
        """Keeps the first `length` tokens and frees the pages after them.

        Returns:
            The copy to be made, if the new last page is partly filled and shared; usually none.

        Raises:
            Exhausted: a copy is needed and no page is free.
            InvalidRequest: `length` is negative or more than there is.
        """
        if not 0 <= length <= self.length:
            raise InvalidRequest(f"length is {length}, but must be 0..{self.length}", field="length")
        num_pages = self._num_pages(length)
        kept, dropped = self.pages[:num_pages], self.pages[num_pages:]
        copies = []
        if length % self._pool.page_size and self._pool.references(kept[-1]) > 1:
            copies = [(kept[-1], self._pool.alloc(1)[0])]
            dropped.append(kept[-1])
            kept[-1] = copies[0][1]
        self._pool.free(dropped)
        self.length, self.pages = length, kept
        return copies

    def fork(self) -> tuple[PagedSequence, list[tuple[int, int]]]:
        """Another sequence with the same tokens: full pages are shared, a partly filled last page is copied.

        Returns:
            The new sequence, and the copy to be made, if any.

        Raises:
            Exhausted: a copy is needed and no page is free.
        """
        num_full = self.length // self._pool.page_size
        shared, partly_filled = self.pages[:num_full], self.pages[num_full:]
        own = self._pool.alloc(len(partly_filled))
        self._pool.share(shared)
        other = PagedSequence(self._pool)
        other.length, other.pages = self.length, shared + own
        return other, list(zip(partly_filled, own, strict=True))

    def free(self) -> None:
        """Gives all pages back; the sequence is empty afterwards."""
        self.truncate(0)

    def _num_pages(self, length: int) -> int:
        return -(-length // self._pool.page_size)


def page_tables(sequences: Sequence[PagedSequence]) -> list[list[int]]:
    """The rows of `sequences`, padded with -1 to equal length: `StepMetadata.page_tables`."""
    num_pages = max((len(sequence.pages) for sequence in sequences), default=0)
    return [sequence.pages + [-1] * (num_pages - len(sequence.pages)) for sequence in sequences]
