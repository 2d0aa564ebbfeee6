"""Every option of Sampling, alone and together, against the slow way (sampling_reference)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.types import NO_LOGPROBS, Sampling
from headrace_worker.sampling.choosing import Choosing
from headrace_worker.sampling.sampler import Chosen, Row
from worker import sampling_reference as reference
from worker.both import sample
from worker.sampling_reference import Text

CASES = int(os.environ.get("HEADRACE_SAMPLING_CASES", "300"))
NAN, INF = float("nan"), float("inf")


def make_mask(allowed: Sequence[bool]) -> NDArray[np.int32]:
    """The bitmask of `allowed`; bits after the last token are set, which nobody may read."""
    words = [0xFFFF_FFFF] * -(-len(allowed) // 32)
    for token, ok in enumerate(allowed):
        if not ok:
            words[token // 32] &= ~(1 << token % 32)
    return np.array(words, np.uint32).view(np.int32)


def make_logits(kind: str, rows: int, vocab: int, seed: int) -> NDArray[np.float32]:
    dice = np.random.default_rng(seed)
    logits = (dice.standard_normal((rows, vocab)) * 3).astype(np.float32)
    if kind == "coarse":  # as bfloat16 leaves them
        logits = torch.from_numpy(logits).bfloat16().float().numpy()
    elif kind == "ties":
        logits = dice.integers(-1, 3, (rows, vocab)).astype(np.float32)
    elif kind == "flat":
        logits[:] = 1.5
    elif kind == "gaps":
        logits[dice.random((rows, vocab)) < 0.7] = -np.inf
    elif kind == "large":
        logits *= 1000
    return logits


@dataclass
class Case:
    """A job with a draft: its rows are chosen in one call, and after some more tokens again."""

    sampling: Sampling
    vocab: int
    prompt: list[int]
    output: list[int]
    draft: tuple[int, ...]
    ends: frozenset[int]
    kind: str
    logits_seed: int
    mask_kind: str = "none"
    open_cases: list[bool] = field(default_factory=list)

    def masks(self, rows: int) -> list[list[bool] | None]:
        dice = np.random.default_rng(self.logits_seed + 1)
        kinds = {
            "none": lambda: None,
            "half": lambda: (dice.random(self.vocab) < 0.5).tolist(),
            "one": lambda: [t == self.logits_seed % self.vocab for t in range(self.vocab)],
            "ends": lambda: [t in self.ends for t in range(self.vocab)],
            "nothing": lambda: [False] * self.vocab,
        }
        return [kinds[self.mask_kind]() for _ in range(rows)]

    def check(self) -> None:
        tokens = self.prompt + self.output
        choosing = Choosing(self.sampling, tokens, len(self.prompt), self.ends, self.vocab)
        self.check_rows(choosing, tokens)
        tokens += self.draft[:2]
        tokens.append(self.vocab - 1)
        self.check_rows(choosing, tokens)

    def check_rows(self, choosing: Choosing, tokens: list[int]) -> None:
        drafts = [self.draft[:n] for n in range(len(self.draft) + 1)]
        logits = make_logits(self.kind, len(drafts), self.vocab, self.logits_seed + len(tokens))
        masks = self.masks(len(drafts))
        rows = [
            Row(choosing, draft, None if mask is None else make_mask(mask))
            for draft, mask in zip(drafts, masks, strict=True)
        ]
        chosen = sample(torch.from_numpy(logits.copy()), rows)
        for raw, draft, mask, choice in zip(logits, drafts, masks, chosen, strict=True):
            text = Text(self.prompt, [*tokens[len(self.prompt) :], *draft], self.ends)
            answer = reference.choose(raw.tolist(), self.sampling, text, mask)
            assert (answer is None) == (choice is None)
            if answer is not None and choice is not None:
                assert choice.token in answer.tokens, (choice, answer)
                self.open_cases.append(not answer.sharp)
                self.check_logprobs(raw, choice)

    def check_logprobs(self, raw: NDArray[np.float32], choice: Chosen) -> None:
        top = self.sampling.logprobs
        assert (choice.logprobs is None) == (top == NO_LOGPROBS)
        if choice.logprobs is None:
            return
        expected = reference.log_softmax(raw.tolist())
        order = sorted(range(self.vocab), key=lambda t: (-raw[t], t))
        named = [t for t in order[:top] if raw[t] > -INF]
        assert [t for t, _ in choice.logprobs.top] == named
        found = [choice.logprobs.logprob, *(p for _, p in choice.logprobs.top)]
        assert found == pytest.approx([expected[t] for t in (choice.token, *named)], abs=2e-6)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    vocab = draw(st.sampled_from([2, 5, 32, 33, 70, 700]))
    token = st.integers(0, min(vocab - 1, 4)) | st.sampled_from([0, vocab - 1])
    options = draw(
        st.fixed_dictionaries(
            {"temperature": st.sampled_from([0.0, 0.0, 1e-5, 0.4, 1.0, 3.0, 100.0])},
            optional={
                "top_k": st.sampled_from([1, 2, 3, 7, 40, 69, 5000]),
                "top_p": st.sampled_from([1e-9, 0.05, 0.3, 0.5, 0.9, 0.999]),
                "min_p": st.sampled_from([1e-9, 0.01, 0.2, 0.9, 1.0]),
                "typical_p": st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.99]),
                "presence_penalty": st.sampled_from([-2.0, -0.3, 0.7, 2.0]),
                "frequency_penalty": st.sampled_from([-2.0, -0.1, 0.33, 2.0]),
                "repetition_penalty": st.sampled_from([0.1, 0.8, 1.3, 2.0]),
                "logit_bias": st.lists(
                    st.tuples(token, st.sampled_from([-100.0, -1.7, 0.3, 2.5, 100.0])),
                    unique_by=lambda pair: pair[0],
                ).map(tuple),
                "min_tokens": st.integers(0, 8),
                "bad_words": st.lists(
                    st.lists(token, min_size=1, max_size=3).map(tuple), max_size=5
                ).map(tuple),
                "logprobs": st.sampled_from([0, 1, 5, 20]),
            },
        )
    )
    return Case(
        sampling=Sampling(max_tokens=99, seed=draw(st.integers(-5, 2**63)), **options),
        vocab=vocab,
        prompt=draw(st.lists(token, min_size=1, max_size=6)),
        output=draw(st.lists(token, max_size=6)),
        draft=tuple(draw(st.lists(token, max_size=4))),
        ends=draw(st.frozensets(token, max_size=2)),
        kind=draw(st.sampled_from(["normal", "coarse", "ties", "flat", "gaps", "large"])),
        logits_seed=draw(st.integers(0, 2**20)),
        mask_kind=draw(st.sampled_from(["none", "none", "half", "one", "ends", "nothing"])),
    )


def test_every_option_means_what_the_slow_way_says() -> None:
    """Random options, texts, drafts, masks, logits; the rows of a job together, then once more."""
    open_cases: list[bool] = []

    @settings(max_examples=CASES, deadline=None)
    @given(cases())
    def compare(case: Case) -> None:
        case.open_cases = open_cases
        case.check()

    compare()
    assert len(open_cases) > CASES, "most rows have an answer"
    assert sum(open_cases) < 0.1 * len(open_cases), "the slow way leaves little open"


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.6},
        {"top_p": 0.99},
        {"typical_p": 0.5},
        {"typical_p": 0.98},
        {"min_p": 0.01},
        {"top_k": 900},
        {"top_k": 400, "min_p": 0.005, "typical_p": 0.9, "top_p": 0.8},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.7, 4.0])
def test_a_large_vocabulary(options: dict[str, float], temperature: float) -> None:
    """Strips, blocks and widening, which small vocabularies never reach; with and without mask."""
    sharp = 0
    for seed in range(6):
        case = Case(
            Sampling(max_tokens=9, temperature=temperature, seed=seed, **options),
            vocab=3001,
            prompt=[0, 5, 3000],
            output=[3000, 7, 7],
            draft=(7, 2999),
            ends=frozenset({2}),
            kind=["normal", "coarse", "ties"][seed % 3],
            logits_seed=seed,
            mask_kind=["none", "half"][seed // 3],
        )
        case.check()
        sharp += case.open_cases.count(False)
    assert sharp >= 18, "half of the rows have one right token"


def choose_one(
    logits: Sequence[float],
    *,
    prompt: Sequence[int] = (0,),
    output: Sequence[int] = (),
    draft: tuple[int, ...] = (),
    ends: frozenset[int] = frozenset(),
    allowed: Sequence[bool] | None = None,
    **options: object,
) -> int | None:
    """The token of one row; greedy unless said otherwise."""
    sampling = Sampling(**({"max_tokens": 9, "temperature": 0.0} | options))  # type: ignore[arg-type]
    choosing = Choosing(sampling, [*prompt, *output], len(prompt), ends, len(logits))
    mask = None if allowed is None else make_mask(allowed)
    [choice] = sample(torch.tensor([list(logits)]), [Row(choosing, draft, mask)])
    return None if choice is None else choice.token


def test_bias_bans_and_forces() -> None:
    """-100 and +100 decide, greedy or drawn; the same bias for all changes nothing."""
    logits = [3.0, 9.0, -2.0, 1.0]
    assert choose_one(logits, logit_bias=((1, -100.0),)) == 0
    assert choose_one(logits, logit_bias=((2, 100.0),)) == 2
    for seed in range(200):
        drawn = {"temperature": 2.0, "seed": seed}
        assert choose_one(logits, logit_bias=((1, -100.0),), **drawn) != 1
        assert choose_one(logits, logit_bias=((2, 100.0),), **drawn) == 2
        everywhere = tuple((t, 8.0) for t in range(4))
        assert choose_one(logits, logit_bias=everywhere, **drawn) == choose_one(logits, **drawn)


def test_bad_words_never_come_out_whole() -> None:
    """The last token is banned when the output says the rest; prompts do not count."""
    logits = [0.0, 1.0, 2.0, 3.0]
    words = {"bad_words": ((1, 2, 3),)}
    assert choose_one(logits, output=[1, 2], **words) == 2
    assert choose_one(logits, output=[1], draft=(2,), **words) == 2, "draft and output meet"
    assert choose_one(logits, draft=(1, 2), **words) == 2
    assert choose_one(logits, output=[1, 2, 2], **words) == 3
    assert choose_one(logits, prompt=[1, 2], **words) == 3
    assert choose_one(logits, prompt=[1], output=[2], **words) == 3
    assert choose_one(logits, bad_words=((3,),)) == 2
    assert choose_one(logits, output=[3], bad_words=((3, 3), (2,))) == 1


def test_no_end_before_min_tokens() -> None:
    """Ends wait for the output position, draft included."""
    logits, ends = [0.0, 1.0, 2.0], frozenset({2})
    assert choose_one(logits, ends=ends) == 2
    assert choose_one(logits, ends=ends, min_tokens=1) == 1
    assert choose_one(logits, ends=ends, min_tokens=2, output=[0]) == 1
    assert choose_one(logits, ends=ends, min_tokens=2, output=[0, 0]) == 2
    assert choose_one(logits, ends=ends, min_tokens=2, output=[0], draft=(0,)) == 2
    assert choose_one(logits, ends=frozenset({2, 99}), min_tokens=1) == 1, "99 is no token here"


def test_the_grammar_wins_over_bans() -> None:
    """What it allows is chosen, bans or not; what it forbids is not, forced or not."""
    logits, ends = [0.0, 1.0, 2.0, 3.0], frozenset({3})
    only_end = {"allowed": [False, False, False, True], "ends": ends}
    assert choose_one(logits, **only_end, min_tokens=5) == 3
    assert choose_one(logits, **only_end, bad_words=((3,),), min_tokens=5) == 3
    some = {"allowed": [True, False, False, True], "ends": ends, "min_tokens": 5}
    assert choose_one(logits, **some) == 0
    assert choose_one(logits, **some, bad_words=((0,),)) == 3, "rather an early end"
    assert choose_one(logits, allowed=[True, True, False, False], logit_bias=((3, 100.0),)) == 1
    assert choose_one(logits, allowed=[False] * 4) is None
    assert choose_one([-INF, 1.0], allowed=[True, False]) is None, "the model rules it out"
    assert choose_one(logits, bad_words=((0,), (1,), (2,), (3,))) == 3, "bans without a mask"


def test_penalties_know_prompt_and_output_apart() -> None:
    """Presence and frequency look at the output, repetition at both; ends of the vocabulary too."""
    logits = [2.0, 1.9, -1.0, 1.8]
    assert choose_one(logits, prompt=[0, 0], presence_penalty=1.0, frequency_penalty=1.0) == 0
    assert choose_one(logits, output=[0], presence_penalty=0.15) == 1
    assert choose_one(logits, output=[0, 1, 1], frequency_penalty=0.15) == 0
    assert choose_one(logits, output=[0, 1], draft=(1, 0, 0), frequency_penalty=0.08) == 3
    assert choose_one(logits, prompt=[0], output=[1], repetition_penalty=1.2) == 3
    assert choose_one(logits, prompt=[0], draft=(3, 1), repetition_penalty=1.2) == 0
    assert choose_one([-1.0, -1.1], prompt=[0], repetition_penalty=1.2) == 1, "times, below 0"
    assert choose_one([1.0, 1.1], prompt=[0], repetition_penalty=5e-324) == 0, "no overflow"


def test_penalties_count_on_as_the_text_grows() -> None:
    """Hundreds of tokens appended one by one: what is cached equals counting anew."""
    dice = np.random.default_rng(3)
    tokens = dice.integers(0, 400, 50).tolist()
    sampling = Sampling(
        99, temperature=0.0, frequency_penalty=0.4, presence_penalty=0.2, repetition_penalty=1.2
    )
    kept = Choosing(sampling, tokens, 20, frozenset(), 400)
    for step in range(300):
        draft = tuple(dice.integers(0, 400, step % 4).tolist())
        logits = make_logits("normal", 1, 400, step)
        fresh = Choosing(sampling, list(tokens), 20, frozenset(), 400)
        [one] = sample(torch.from_numpy(logits.copy()), [Row(kept, draft)])
        [other] = sample(torch.from_numpy(logits.copy()), [Row(fresh, draft)])
        text = Text(tokens[:20], [*tokens[20:], *draft], frozenset())
        answer = reference.choose(logits[0].tolist(), sampling, text, None)
        assert one == other and one is not None and answer is not None
        assert one.token in answer.tokens
        tokens.append(one.token if step % 3 else int(dice.integers(400)))
