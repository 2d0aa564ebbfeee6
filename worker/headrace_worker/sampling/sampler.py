"""From logits to tokens.

Invariant: a row's token depends on that row's logits, its job's options and text, its seed and its
position, on nothing else in the batch, bit for bit. Each stage works on one row in one thread, and
a stage that a row does not ask for costs it nothing: a greedy batch is one argmax.

Where there are native kernels they take the last stages: of rows that nobody edits in the call that
computes the step, of the others in one more for all. They draw the same tokens, since weights are
defined to the bit and their sums are exact (`weights`); what is written here in numpy is what the
kernels are held to.

The stages, each in its module: logprobs of the raw logits (`logprobs`); mask, logit_bias, bans,
penalties (`edits`), for greedy rows too; then the first highest logit at temperature 0, else
temperature and filters (`filters`) and one draw (`draw`) by numbers from (seed, position)
(`uniform`).

Speculation asks for several rows of one job at once, each with a longer draft. A draft token is
right iff it is the token drawn for its row: the numbers drawn by do not depend on the draft, so
the text is the same as without speculation. Rejected: accepting a draft token with its probability
(Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023), which for a
draft without probabilities of its own accepts as often, and makes the text depend on the draft.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from headrace.types import TokenLogprobs
from headrace_worker.native.abi import Library
from headrace_worker.native.draws import FIRST_TO_FIND, Draws, tops_of
from headrace_worker.sampling.choosing import Choosing
from headrace_worker.sampling.draw import draw
from headrace_worker.sampling.edits import edit
from headrace_worker.sampling.filters import keep
from headrace_worker.sampling.logprobs import row_logprobs
from headrace_worker.sampling.ranking import Floats, rows_of
from headrace_worker.sampling.uniform import uniforms
from headrace_worker.sampling.weights import weigh


@dataclass(frozen=True, slots=True)
class Row:
    """Whose token to choose, as if `draft` had been said after the job's tokens.

    `mask`: what the grammar allows, int32 [ceil(vocab / 32)], token t is bit t % 32 of word
    t // 32; None for everything.
    """

    choosing: Choosing
    draft: tuple[int, ...] = ()
    mask: NDArray[np.int32] | None = None

    @property
    def edits(self) -> bool:
        """Whether anything changes this row's logits."""
        choosing = self.choosing
        return self.mask is not None or choosing.edits or choosing.holds_ends(self.draft)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A row's token; `logprobs` where its job asks for them."""

    token: int
    logprobs: TokenLogprobs | None = None


_NONE_DRAWN: Mapping[int, int] = {}


def sample(
    logits: Tensor | Floats,
    rows: Sequence[Row],
    tops: Sequence[int] | None = None,
    library: Library | None = None,
    drawn: Mapping[int, int] = _NONE_DRAWN,
) -> list[Chosen | None]:
    """One token per row of logits, float32 [M, vocab], which may be overwritten.

    `tops`: the token of each row's first highest logit, -1 where that is not finite; None: to be
    found here. `library`: the kernels, which choose the same tokens; None to do without. `drawn`:
    those that the step has drawn already (`draws_of`), by row. None where a row has no finite
    maximum, or where its mask allows nothing that the model does.
    """
    values = rows_of(logits)
    assert values.dtype == np.float32 and len(values) == len(rows), "a float32 row of logits each"
    with np.errstate(over="ignore", under="ignore"):
        if library is not None:
            tops = tops_of(library, values) if tops is None else tops
            return _by_kernels(library, values, rows, tops, drawn)
        return _by_numpy(values, rows, _tops(values) if tops is None else tops)


def _by_numpy(values: Floats, rows: Sequence[Row], tops: Sequence[int]) -> list[Chosen | None]:
    """What all of `sample` means."""
    room: Floats | None = None
    chosen: list[Chosen | None] = []
    for raw, row, top, numbers in zip(values, rows, tops, numbers_of(rows), strict=True):
        if top < 0:
            chosen.append(None)
        elif numbers is None and not row.edits and not row.choosing.wants_logprobs:
            chosen.append(Chosen(top))
        else:
            room = np.empty(values.shape[1], np.float32) if room is None else room
            chosen.append(_choose(raw, row, top, numbers, room))
    return chosen


def draws_of(rows: Sequence[Row | None]) -> Draws:
    """What the call that computes a step can draw by itself: of rows whose logits nobody changes.

    `rows`: for each wanted row of the step whose token to choose; None where it is scored.
    """
    draws = Draws()
    for place, row in enumerate(rows):
        if row is not None and row.choosing.draws and row.choosing.native and not row.edits:
            _add(draws, row, place, FIRST_TO_FIND)
    return draws


def _add(draws: Draws, row: Row, place: int, top: int) -> None:
    choosing = row.choosing
    draws.add(choosing.options, choosing.sampling.seed, choosing.position(row.draft), place, top)


def _by_kernels(
    library: Library,
    values: Floats,
    rows: Sequence[Row],
    tops: Sequence[int],
    drawn: Mapping[int, int],
) -> list[Chosen | None]:
    """The same; what draws does so in one call, for all rows that the kernels can do."""
    tokens, draws = list(tops), Draws()
    raws: dict[int, Floats] = {}
    for place, (row, top) in enumerate(zip(rows, tops, strict=True)):
        choosing, edits = row.choosing, row.edits
        if top < 0 or place in drawn or not choosing.native or not (edits or choosing.draws):
            continue
        if edits:
            if choosing.wants_logprobs:
                raws[place] = values[place].copy()
            edit(values[place], choosing, row.draft, row.mask)
            top = FIRST_TO_FIND
        _add(draws, row, place, top)
    for place, token in (*drawn.items(), *draws.run(library, values).items()):
        tokens[place] = token
    room: Floats | None = None
    chosen: list[Chosen | None] = []
    for place, (row, token, top) in enumerate(zip(rows, tokens, tops, strict=True)):
        choosing = row.choosing
        if token < 0:
            chosen.append(None)
        elif choosing.native and not choosing.wants_logprobs:
            chosen.append(Chosen(token))
        else:
            room = np.empty(values.shape[1], np.float32) if room is None else room
            raw = raws.get(place, values[place])
            chosen.append(
                _with_logprobs(raw, choosing, raw[top], token, room)
                if choosing.native
                else _choose(raw, row, top, numbers_of([row])[0], room)
            )
    return chosen


def _tops(values: Floats) -> list[int]:
    """Of float32 [M, vocab]: the index of each row's first highest number; -1 if not finite."""
    tokens = values.argmax(axis=1)
    peaks = values[np.arange(len(values)), tokens]
    found: list[int] = np.where(np.isfinite(peaks), tokens, -1).tolist()
    return found


def numbers_of(rows: Sequence[Row]) -> list[list[float] | None]:
    """The numbers in [0, 1) that each row draws by; None for the greedy ones."""
    numbers: list[list[float] | None] = [None] * len(rows)
    drawn = [i for i, row in enumerate(rows) if row.choosing.sampling.temperature > 0]
    if drawn:
        seeds = [rows[i].choosing.sampling.seed for i in drawn]
        positions = [rows[i].choosing.position(rows[i].draft) for i in drawn]
        for i, made in zip(drawn, uniforms(seeds, positions).tolist(), strict=True):
            numbers[i] = made
    return numbers


def _choose(
    raw: Floats, row: Row, token: int, numbers: list[float] | None, room: Floats
) -> Chosen | None:
    """Of one row of `raw` logits, float32 [vocab], of which that of `token` is the highest."""
    peak: np.float32 = raw[token]
    choosing, logits, best = row.choosing, raw, peak
    if row.edits:
        if choosing.wants_logprobs:
            logits = raw.copy()
        edit(logits, choosing, row.draft, row.mask)
        token = int(logits.argmax())
        best = logits[token]
        if not np.isfinite(best):
            return None
    if numbers is not None:
        token = _draw(logits, best, choosing, numbers, room)
    if not choosing.wants_logprobs:
        return Chosen(token)
    return _with_logprobs(raw, choosing, peak, token, room)


def _with_logprobs(
    raw: Floats, choosing: Choosing, peak: np.float32, token: int, room: Floats
) -> Chosen:
    return Chosen(token, row_logprobs(raw, peak, token, choosing.sampling.logprobs, room))


def _draw(
    logits: Floats, best: np.float32, choosing: Choosing, numbers: list[float], room: Floats
) -> int:
    if choosing.unfiltered:
        return draw(weigh(logits, best, choosing.sampling.temperature, room), numbers)
    ids, weights = keep(logits, best, choosing.sampling, room)
    if ids is not None:
        room.fill(0)
        room[ids] = weights
        weights = room
    return draw(weights, numbers)
