"""Where blocks of 16 tokens lie in pages of 256: what flash-attn 2 reads, which knows whole pages.

The engine's blocks are virtual: a block's id says nothing about where its KV lies. A run is up to
16 blocks that follow each other in a sequence from a multiple of 16 on; to be read it has to stand
in one page, in order. So a sequence's new blocks take the next places of its last page, and shared
blocks stay where their first owner has them. Where two sequences part within a page, the second one
gets a page of its own with copies of what they share of it: at most 15 blocks, once. When no page
is empty, the one with the least that is nowhere else gives what it has to holes of other pages.

Invariant: every block that was ever written is at one place at least, its main one, and perhaps at
copies; one that is being written is at one place only. A place holds one block or none. Places are
found again from these facts alone: nobody has to tell when a block is freed, only when one is
written anew.

What cannot be laid even so (more runs in one step than pages: many sequences that part within the
same page) is told as scattered, and computed from copies. Rejected: blocks of 256 tokens, with
which a prefix of 255 is not shared; sequences that own whole pages of the block pool, which costs
the scheduler blocks that it does not see.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

EMPTY = -1
CANDIDATES_MAX = 4
"""Pages that are looked at for one run."""

Run = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Laid:
    """Where a step's sequences lie.

    `pages[s]`: the pages of sequence s, in order; None where it is scattered. `moves`: (from, to)
    places, all read before any is written.
    """

    pages: list[list[int] | None]
    moves: list[tuple[int, int]]


class PageMap:
    """`blocks` virtual blocks over `pages` pages of `each` places; place = page * each + index."""

    def __init__(self, blocks: int, pages: int, each: int) -> None:
        assert pages * each >= blocks + each, "one page more than the blocks fill"
        self.blocks, self.pages, self.each = blocks, pages, each
        self._holds = [EMPTY] * (pages * each)
        self._places: list[list[int]] = [[] for _ in range(blocks)]
        """By block: its places, the main one first."""
        self._filled = [0] * pages
        """By page: places that hold something."""
        self._alone = [0] * pages
        """By page: places that hold what is nowhere else."""
        self._laid: dict[Run, int] = {}
        self._runs: list[Run | None] = [None] * pages
        """By page: the run in `_laid` that stands in it."""
        self._empty_pages = dict.fromkeys(range(pages))
        self._partial: dict[int, None] = {}
        """Pages with something in them, and a hole."""
        self._holes = pages * each
        self._copies: dict[int, None] = {}
        """Places that hold what another place holds too, the oldest first."""
        self._unplaced = 0
        """Blocks of the step that is being laid that have no place yet."""
        self._origins: dict[int, int] = {}
        """Of the step that is being laid: by place written, the place whose content it gets."""

    def place(self, block: int) -> int | None:
        """Where `block` lies; None when it was never written."""
        places = self._places[block]
        return places[0] if places else None

    def places(self, block: int) -> tuple[int, ...]:
        """Everywhere that `block` lies."""
        return tuple(self._places[block])

    # --- a step

    def lay(
        self, tables: Sequence[Sequence[int]], written: Collection[int], fresh: Iterable[int]
    ) -> Laid:
        """Finds every sequence's runs a page.

        `written`: blocks that the step writes to, the last ones of the tables; `fresh`: those of
        them that it writes from their start. All others have been written or stored before. Each
        of `written` has one place afterwards.
        """
        self._origins = {}
        runs = [self._runs_of(table) for table in tables]
        growing = {own[-1] for own in runs if own}
        for block in dict.fromkeys(fresh):
            self._begin(block, growing)
        taken: dict[int, Run] = {}
        rest: dict[Run, None] = {}
        for run in (run for own in runs for run in own):
            page = self._laid.get(run)
            if page is None:
                rest[run] = None
            else:
                taken[page] = run
        self._unplaced = len({b for run in rest for b in run if not self._places[b]})
        for run in rest:
            page = self._lay_run(run, taken)
            if page is not None:
                taken[page] = run
        for block in (block for run in rest for block in run):
            if not self._places[block]:  # of a sequence that is scattered
                self._put(block, self._hole(taken))
        found = {run: page for page, run in taken.items()}
        pages = [
            [found[run] for run in own] if all(run in found for run in own) else None
            for own in runs
        ]
        for table, own_pages in zip(tables, pages, strict=True):
            self._settle(table, own_pages, written)
        origins, self._origins = self._origins, {}
        return Laid(pages, [(source, place) for place, source in origins.items()])

    def _runs_of(self, table: Sequence[int]) -> list[Run]:
        each = self.each
        return [tuple(table[i : i + each]) for i in range(0, len(table), each)]

    def _settle(
        self, table: Sequence[int], pages: list[int] | None, written: Collection[int]
    ) -> None:
        """What is written to is where it is read from, and nowhere else."""
        for index in range(len(table) - 1, -1, -1):
            block = table[index]
            if block not in written:
                return
            kept = self._places[block][0]
            if pages is not None:
                kept = pages[index // self.each] * self.each + index % self.each
            for place in [place for place in self._places[block] if place != kept]:
                self._drop(place)

    def _begin(self, block: int, growing: set[Run]) -> None:
        """`block` starts anew; it keeps a place in which it is being written already."""
        places = self._places[block]
        if len(places) != 1 or self._runs[places[0] // self.each] not in growing:
            self.forget(block)

    def _lay_run(self, run: Run, taken: dict[int, Run]) -> int | None:
        """A page in which `run` stands from now on; None where there is none to be had."""
        written = sum(1 for block in run if self._places[block])
        best, cost = None, written + 1
        for page in self._candidates(run):
            price = self._price(run, page, taken)
            if price is not None and price < cost:
                best, cost = page, price
        if best is None or (cost > 0 and cost >= written and self._empty_pages):
            best = next(iter(self._empty_pages), None)
        if best is None:
            best = self._vacated(taken)
        if best is None or not self._fill(run, best, taken):
            return None
        self._name(run, best)
        return best

    def _candidates(self, run: Run) -> list[int]:
        """Pages that hold some of `run` where it belongs, those of its last blocks first."""
        pages: dict[int, None] = {}
        for index in range(len(run) - 1, -1, -1):
            for place in self._places[run[index]]:
                if place % self.each == index:
                    pages.setdefault(place // self.each)
            if len(pages) >= CANDIDATES_MAX:
                break
        return list(pages)

    def _price(self, run: Run, page: int, taken: dict[int, Run]) -> int | None:
        """Blocks to move for `run` to stand in `page`; None where another one of the step does."""
        if page in taken:
            return None
        price = 0
        for index, block in enumerate(run):
            held = self._holds[page * self.each + index]
            if held == block:
                continue
            if self._places[block]:
                price += 1
            if held != EMPTY and len(self._places[held]) == 1:
                price += 1
        return price

    def _fill(self, run: Run, page: int, taken: dict[int, Run]) -> bool:
        """Puts what of `run` is not in `page` where it belongs; False where there is no room."""
        kept, start = {**taken, page: run}, page * self.each
        missing = [i for i, block in enumerate(run) if self._holds[start + i] != block]
        strangers = [self._holds[start + i] for i in missing if self._holds[start + i] != EMPTY]
        alone = sum(1 for block in strangers if len(self._places[block]) == 1)
        copied = sum(1 for i in missing if self._places[run[i]])
        if alone and self._room(kept) < alone:
            return False
        if copied and self._holes + self._spare_copies(kept) < copied + self._unplaced:
            return False
        for index in missing:
            block, place = run[index], start + index
            if self._holds[place] != EMPTY:
                self._evict(place, kept)
            source = self.place(block)
            if source is None:
                self._put(block, place)
                self._unplaced -= 1
            else:
                self._copy(block, source, place)
        return True

    def _vacated(self, taken: dict[int, Run]) -> int | None:
        """The page that is emptied with the fewest moves, emptied; None where none can be."""
        best, fewest = None, self.each
        for page in range(self.pages):
            if page in taken:
                continue
            if self._alone[page] < fewest:
                best, fewest = page, self._alone[page]
        if best is None:
            return None
        kept = {**taken, best: ()}
        if self._room(kept) < fewest:
            return None
        for place in range(best * self.each, (best + 1) * self.each):
            if self._holds[place] != EMPTY:
                self._evict(place, kept)
        return best

    def _room(self, taken: dict[int, Run]) -> int:
        """Places outside the pages taken that are holes, or hold a copy that can go."""
        inside = sum(self.each - self._filled[page] for page in taken)
        return self._holes - inside + self._spare_copies(taken)

    def _spare_copies(self, taken: dict[int, Run]) -> int:
        return sum(1 for place in self._copies if place // self.each not in taken)

    def _hole(self, taken: dict[int, Run]) -> int:
        """An empty place, outside the pages taken if there is one; a copy gives its up if not.

        The last resort are places behind the runs of pages taken, which nobody reads; and then a
        copy in one, whose run is not laid any more.
        """
        for pages in (self._partial, self._empty_pages):
            page = next((page for page in pages if page not in taken), None)
            if page is not None:
                return self._first_hole(page)
        copy = next((place for place in self._copies if place // self.each not in taken), None)
        if copy is not None:
            self._drop(copy)
            return copy
        if self._partial:
            return self._first_hole(next(iter(self._partial)))
        copy = next(iter(self._copies))
        self._drop(copy)
        taken.pop(copy // self.each)  # what stood there is not laid after all
        return copy

    def _first_hole(self, page: int) -> int:
        span = range(page * self.each, (page + 1) * self.each)
        return next(place for place in span if self._holds[place] == EMPTY)

    # --- places

    def store(self, block: int) -> int:
        """A place for what comes from elsewhere under `block`'s name: its only one."""
        self.forget(block)
        place = self._hole({})
        self._put(block, place)
        return place

    def forget(self, block: int) -> None:
        """`block` holds nothing any more."""
        for place in list(self._places[block]):
            self._drop(place)

    def _put(self, block: int, place: int) -> None:
        assert self._holds[place] == EMPTY and not self._places[block], "a place for one block"
        self._hold(block, place)

    def _copy(self, block: int, source: int, place: int) -> None:
        self._hold(block, place)
        self._origins[place] = self._origins.get(source, source)
        self._copies[place] = None

    def _hold(self, block: int, place: int) -> None:
        page, places = place // self.each, self._places[block]
        self._holds[place] = block
        if not places:
            self._alone[page] += 1
        elif len(places) == 1:
            self._alone[places[0] // self.each] -= 1
        places.append(place)
        self._holes -= 1
        self._filled[page] += 1
        self._sort(page)

    def _evict(self, place: int, taken: dict[int, Run]) -> None:
        """Frees `place`; what is nowhere else is moved to a hole first."""
        block = self._holds[place]
        if len(self._places[block]) == 1:
            self._copy(block, place, self._hole(taken))
        self._drop(place)

    def _drop(self, place: int) -> None:
        """What `place` holds is not there any more."""
        block, page = self._holds[place], place // self.each
        self._holds[place] = EMPTY
        places = self._places[block]
        places.remove(place)
        self._copies.pop(place, None)
        if places:
            self._copies.pop(places[0], None)  # it is the main one now
        if not places:
            self._alone[page] -= 1
        elif len(places) == 1:
            self._alone[places[0] // self.each] += 1
        self._origins.pop(place, None)
        self._holes += 1
        self._filled[page] -= 1
        self._sort(page)
        self._unname(page)

    def _sort(self, page: int) -> None:
        """Among the empty pages, those partly filled, or neither."""
        filled = self._filled[page]
        for pages, belongs in (
            (self._empty_pages, not filled),
            (self._partial, 0 < filled < self.each),
        ):
            if belongs:
                pages.setdefault(page)
            else:
                pages.pop(page, None)

    def _name(self, run: Run, page: int) -> None:
        self._unname(page)
        other = self._laid.get(run)
        if other is not None:
            self._runs[other] = None
        self._laid[run], self._runs[page] = page, run

    def _unname(self, page: int) -> None:
        run = self._runs[page]
        if run is not None:
            del self._laid[run]
            self._runs[page] = None

    def check_integrity(self) -> None:
        """Blocks and places name each other; counts and names are true."""
        for block, places in enumerate(self._places):
            assert len(places) == len(set(places)), "a place twice"
            assert all(self._holds[place] == block for place in places), "a place of another block"
        held = {place for place, block in enumerate(self._holds) if block != EMPTY}
        assert held == {p for places in self._places for p in places}, "a place that nobody knows"
        assert self._holes == len(self._holds) - len(held), "holes are miscounted"
        copies = {place for places in self._places for place in places[1:]}
        assert copies == self._copies.keys(), "copies are miscounted"
        for page in range(self.pages):
            span = range(page * self.each, (page + 1) * self.each)
            assert self._filled[page] == len(held & set(span)), "a page is miscounted"
            alone = [p for p in held & set(span) if len(self._places[self._holds[p]]) == 1]
            assert self._alone[page] == len(alone), "what is nowhere else is miscounted"
            partly = 0 < self._filled[page] < self.each
            assert (page in self._empty_pages) == (not self._filled[page]), "an empty page is lost"
            assert (page in self._partial) == partly, "a page is in the wrong list"
        for run, page in self._laid.items():
            assert self._runs[page] == run, "a run without its page"
            start = page * self.each
            assert tuple(self._holds[start : start + len(run)]) == run, "a run that is not there"
