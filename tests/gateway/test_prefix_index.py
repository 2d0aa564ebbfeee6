"""The prefix index: who holds how much of a prompt, by reports, by expectation, within bounds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.policy.hashing import hash64
from headrace_gateway.policy.expectations import TTL_MS, Expectations, grid, prompt_of
from headrace_gateway.policy.prefix_index import WALKED, PrefixIndex

NOW = 1_700_000_000_000


def chain(name: str, blocks: int, after: bytes = b"") -> bytes:
    """Keys of a prompt's blocks; `after` is the prompt that it continues."""
    own = (hash64(f"{name}/{at}".encode()).to_bytes(8) for at in range(blocks - len(after) // 8))
    return after + b"".join(own)


def cut(keys: bytes, first: int, last: int | None = None) -> bytes:
    return keys[8 * first : None if last is None else 8 * last]


def test_a_worker_counts_for_the_leading_blocks_it_holds() -> None:
    index = PrefixIndex()
    prompt = chain("a", 100)
    index.stored("long", cut(prompt, 0, 90))
    index.stored("short", cut(prompt, 0, 40))
    index.stored("other", chain("b", 50))
    assert index.match(prompt) == {"long": 90, "short": 40}
    assert index.match(chain("c", 70, after=cut(prompt, 0, 60))) == {"long": 60, "short": 40}
    assert index.match(chain("d", 10)) == {}
    assert index.match(b"") == {}
    index.removed("long", cut(prompt, 20))
    assert index.match(prompt) == {"short": 40, "long": 20}
    index.check_integrity()


def test_a_worker_that_lost_an_early_block_does_not_count_for_later_ones() -> None:
    index = PrefixIndex()
    prompt = chain("a", 50)
    index.stored("w", prompt)
    index.removed("w", cut(prompt, 3, 4))
    assert index.match(prompt) == {"w": 3}
    index.removed("w", cut(prompt, 0, 1))
    assert index.match(prompt) == {}
    index.stored("w", cut(prompt, 0, 4))
    assert index.match(prompt) == {"w": 50}


def test_what_was_dispatched_is_expected_for_a_time() -> None:
    """A second prompt finds the first's worker before anything was reported."""
    index = PrefixIndex()
    prompt = chain("a", 37)
    index.expect("w", prompt, NOW)
    index.expire(NOW + 1)
    assert index.match(prompt) == {"w": 37}
    longer = chain("b", 60, after=prompt)
    assert index.match(longer) == {"w": 32}, "rounded down to a depth that is kept"
    index.stored("w", prompt)
    assert index.match(longer) == {"w": 37}, "reports say it exactly"
    for passed in (TTL_MS // 2, TTL_MS):
        index.expire(NOW + passed)
    index.removed("w", cut(prompt, 30))
    assert index.match(prompt) == {"w": 30}, "the rest is no longer expected, but reported"


def test_an_expectation_ends_when_it_is_not_met() -> None:
    index = PrefixIndex()
    prompt = chain("a", 20)
    index.expect("w", prompt, NOW)
    index.expire(NOW + TTL_MS // 2 - 1)
    assert index.match(prompt) == {"w": 20}
    index.expire(NOW + TTL_MS)
    index.expire(NOW + 2 * TTL_MS)
    assert index.match(prompt) == {}
    index.expect("w", prompt, NOW + 2 * TTL_MS)
    index.removed("w", cut(prompt, 16))
    assert index.match(prompt) == {"w": 16}, "evicted already"
    index.expire(NOW)  # the clock was set back
    assert index.match(prompt) == {}


def test_a_snapshot_replaces_what_was_reported() -> None:
    index = PrefixIndex()
    old, new = chain("old", 30), chain("new", 30)
    index.stored("w", old)
    index.replace("w", cut(old, 0, 10) + new)
    assert index.match(old) == {"w": 10}
    assert index.match(new) == {"w": 30}
    index.replace("w", b"")
    assert len(index) == 0
    index.check_integrity()


def test_the_index_is_bounded_by_worker_and_in_total() -> None:
    """The oldest blocks are forgotten first; who comes makes everybody's part smaller."""
    index = PrefixIndex(total_max=1_000)
    index.limit("w0", 100)
    for number in range(20):
        index.stored("w0", chain(f"p{number}", 10))
        index.check_integrity()
    assert len(index) <= 111
    assert index.match(chain("p0", 10)) == {}
    assert index.match(chain("p19", 10)) == {"w0": 10}
    for worker in range(1, 40):
        index.stored(f"w{worker}", chain(f"q{worker}", 60))
        index.check_integrity()
    assert len(index) <= 1_000
    index.limit("w0", 5)
    index.check_integrity()


def test_a_slot_is_used_again_only_when_nothing_names_it_any_more() -> None:
    index = PrefixIndex()
    prompt = chain("a", 10)
    index.expect("gone", prompt, NOW)
    index.forget_worker("gone")
    index.forget_worker("gone")
    index.stored("new", chain("b", 1))
    assert index.match(prompt) == {}, "the new worker does not inherit what was expected"
    index.check_integrity()
    for turn in range(1, 4):
        index.expire(NOW + turn * TTL_MS)
    index.stored("newer", chain("c", 1))
    assert index.bits["newer"] == 1, "a fleet that changes for ever uses few slots"
    index.check_integrity()


def test_expectations_are_bounded() -> None:
    expected = Expectations(expected_max=50)
    for number in range(100):
        prompt = prompt_of(memoryview(chain(f"p{number}", 40)).cast("Q"))
        expected.add(1, prompt, NOW)
        expected.check_integrity()
        assert expected.leaders(prompt, 1)[0].blocks == 40
    assert grid(40) == (1, 2, 3, 4, 6, 8, 12, 16, 32, 40)
    assert grid(1) == (1,)


# prompts are branches of a small tree, so that they share prefixes of all lengths
PROMPTS = [chain("root", 40)]
for _name, _parent, _at, _length in (
    ("a", 0, 5, 30), ("b", 0, 25, 60), ("c", 1, 20, 50), ("d", 2, 59, 90), ("e", 2, 17, 18),
):  # fmt: skip
    PROMPTS.append(chain(_name, _length, after=cut(PROMPTS[_parent], 0, _at)))
WORKERS = ["w0", "w1", "w2"]


def naive(held: dict[str, set[bytes]], prompt: bytes) -> dict[str, int]:
    """Walk the blocks of every worker."""
    found = {}
    for worker, keys in held.items():
        blocks = [prompt[at : at + 8] for at in range(0, len(prompt), 8)]
        count = next((at for at, key in enumerate(blocks) if key not in keys), len(blocks))
        if count:
            found[worker] = count
    return found


steps = st.lists(
    st.tuples(
        st.sampled_from(["store", "evict", "replace", "forget"]),
        st.sampled_from(WORKERS),
        st.integers(0, len(PROMPTS) - 1),
        st.integers(0, 90),
    ),
    max_size=30,
)


@settings(max_examples=150)
@given(steps)
def test_matches_are_those_of_walking_every_pool(program: list[tuple[str, str, int, int]]) -> None:
    """Pools lose tails before heads, as real ones do; then bisection finds what walking finds."""
    index, held = PrefixIndex(), {worker: set[bytes]() for worker in WORKERS}
    for action, worker, number, blocks in program:
        prompt = PROMPTS[number]
        part = cut(prompt, 0, blocks)
        mine = held[worker]
        match action:
            case "store":
                index.stored(worker, part)
                mine.update(part[at : at + 8] for at in range(0, len(part), 8))
            case "evict":
                # the block goes with everything behind it, in every prompt that it is part of
                lost = prompt[8 * blocks : 8 * blocks + 8]
                gone = {
                    each[at : at + 8]
                    for each in PROMPTS
                    if lost and lost in [each[at : at + 8] for at in range(0, len(each), 8)]
                    for at in range(each.index(lost), len(each), 8)
                }
                index.removed(worker, b"".join(sorted(gone)))
                mine -= gone
            case "replace":
                index.replace(worker, part)
                mine.clear()
                mine.update(part[at : at + 8] for at in range(0, len(part), 8))
            case "forget":
                index.forget_worker(worker)
                mine.clear()
        index.check_integrity()
        for each in PROMPTS:
            assert index.match(each) == naive(held, each)


@settings(max_examples=100)
@given(steps)
def test_holes_in_the_walked_part_are_never_overlooked(
    program: list[tuple[str, str, int, int]],
) -> None:
    """Whatever is removed: nobody counts who lacks one of the first blocks."""
    index, held = PrefixIndex(), {worker: set[bytes]() for worker in WORKERS}
    for action, worker, number, blocks in program:
        prompt = PROMPTS[number]
        some = cut(prompt, blocks // 2, blocks)
        keys = {some[at : at + 8] for at in range(0, len(some), 8)}
        if action in ("store", "replace"):
            index.stored(worker, prompt)
            held[worker] |= {prompt[at : at + 8] for at in range(0, len(prompt), 8)}
        else:
            index.removed(worker, some)
            held[worker] -= keys
        index.check_integrity()
        for each in PROMPTS:
            found, exact = index.match(each), naive(held, each)
            assert found.keys() == exact.keys()
            for name, count in exact.items():
                assert found[name] >= count
                assert found[name] == count or count >= WALKED
