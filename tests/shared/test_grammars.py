"""Grammars: what comes out matches them, whatever order the matcher is asked in.

The random schemas and the walks through them are seeded; HEADRACE_SCHEMAS makes them more.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from headrace import grammar_matcher, grammars
from headrace.errors import CallerError
from headrace.grammar_schemas import checked_schema
from headrace.grammars import Grammars, Matcher
from headrace.types import ModelRecord
from support.api import make_record, tiny_tokenizer
from support.schemas import Schemas, errors

SCHEMAS = int(os.environ.get("HEADRACE_SCHEMAS", "500"))
TOKENS_MAX = 600
HASTE_TOKENS = 60
CLOSERS = ('"', '"}', '"]'), ("}", "]", ",", '"', "null")
FILLERS = ("@", ".", ":", "a", "c", "D", "M", "0", " ", "-")
"""What strings with a form need before they can end."""

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


class Model:
    """A record with its tokenizer and its compiler."""

    def __init__(self, record: ModelRecord) -> None:
        self.record = record
        self.grammars = Grammars(record)
        self.tokenizer = self.grammars._vocabulary.tokenizer
        self.end = record.eos_token_ids[0]

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.tokenize_str(text))

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode_bytes(list(tokens)).decode()

    def allowed(self, mask: bytearray) -> NDArray[np.intp]:
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
        return np.flatnonzero(bits)

    def takes(self, grammar: str, text: str) -> bool:
        """Whether `text`, whole, is one that `grammar` allows."""
        matcher = self.grammars.compile(grammar)
        return all(matcher.accept(t) for t in self.encode(text)) and matcher.accept(self.end)

    def write(self, matcher: Matcher, seed: int) -> list[int]:
        """A text of any allowed tokens, but of those that close it once it is long enough.

        [] for one that never ends: a number may go on for ever.
        """
        random = Random(seed)
        tokens: list[int] = []
        said, quoted = "", False
        while len(tokens) < TOKENS_MAX:
            allowed = self.allowed(matcher.mask())
            assert not matcher.failure
            haste = len(tokens) > HASTE_TOKENS
            if matcher.ended or (self.end in allowed and (haste or random.random() < 0.5)):
                return tokens
            wanted = self.wanted(quoted, random) if haste or random.random() < 0.3 else []
            token = next((t for t in wanted if t in allowed), None)
            if token is None:
                token = int(random.choice(allowed[allowed != self.end]))
            assert matcher.accept(token), f"{token} is allowed by its mask"
            tokens.append(token)
            said = self.tokenizer.decode_bytes(tokens).decode(errors="replace")
            quoted = len(re.findall(r'(?<!\\)(?:\\\\)*"', said)) % 2 == 1
        return []

    def wanted(self, quoted: bool, random: Random) -> list[int]:
        """Tokens that bring a text nearer to its end, inside or outside of a string."""
        fillers = FILLERS if quoted else "0123456789"
        texts = [*CLOSERS[not quoted], *random.sample(fillers, len(fillers))]
        return [tokens[0] for tokens in map(self.encode, texts) if len(tokens) == 1]


def sentencepiece() -> Tokenizer:
    """BPE with byte fallback and ▁ for spaces, as Llama 2 and Mistral have it."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*'{}[]":,▁abcdefghijklmnopqrstuvwxyz0123456789.-', '▁"', "na", "nam", "name", '":']
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *bytes_, *pieces])}
    merges = [("▁", '"'), ("n", "a"), ("na", "m"), ("nam", "e"), ('"', ":")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Model:
    from headrace_worker.loading.gguf_file import GgufSource

    source = GgufSource(smollm2_path)
    facts = source.tokenizer()
    record = replace(
        make_record(),
        vocab_size=source.config.vocab_size,
        eos_token_ids=facts.eos_token_ids,
        tokenizer_json=facts.json,
    )
    return Model(record)


@pytest.fixture(scope="session")
def tiny() -> Model:
    return Model(make_record())


@pytest.fixture(scope="session")
def pieces() -> Model:
    return Model(make_record(tokenizer=sentencepiece()))


def check_schemas(model: Model, seeds: range) -> None:
    unfinished = 0
    for seed in seeds:
        schema = Schemas(seed).draw()
        tokens = model.write(model.grammars.compile(grammars.json_schema(schema)), seed)
        if not tokens:
            unfinished += 1
            continue
        text = model.text(tokens)
        wrong = errors(schema, json.loads(text))
        assert not wrong, f"seed {seed}: {wrong} in {text!r} under {json.dumps(schema)}"
    assert unfinished <= len(seeds) // 50, "nearly all come to their end"


def test_every_output_under_random_schemas_is_valid(smollm2: Model) -> None:
    check_schemas(smollm2, range(SCHEMAS))


def test_so_it_is_with_vocabularies_of_other_kinds(tiny: Model, pieces: Model) -> None:
    check_schemas(tiny, range(10_000, 10_030))
    check_schemas(pieces, range(20_000, 20_030))


@pytest.mark.parametrize("which", ["tiny", "pieces", "smollm2"])
def test_forced_tokens_are_the_only_ones_a_mask_allows(
    which: str, request: pytest.FixtureRequest
) -> None:
    """Whether a run is taken whole or token by token, from its start or from a cut within it."""
    model: Model = request.getfixturevalue(which)
    for seed in range(30_000, 30_040):
        grammar = grammars.json_schema(Schemas(seed).draw())
        alone, random = model.grammars.compile(grammar), Random(seed)
        tokens: list[int] = []
        runs = 0
        while len(tokens) < 80 and not alone.ended:
            run = alone.forced()
            runs += len(run) > 1
            for at, token in enumerate(run):
                assert alone.forced() == run[at:], "the rest of a run is forced"
                assert list(model.allowed(alone.mask())) == [token]
                assert alone.accept(token)
            tokens += run
            choices = model.allowed(alone.mask())
            if run == [] and model.end not in choices:
                tokens.append(int(random.choice(choices)))
                assert alone.accept(tokens[-1])
            elif model.end in choices:
                break
        cut = random.randrange(len(tokens) + 1)
        resumed = model.grammars.compile(grammar)
        assert all(resumed.accept(token) for token in tokens[:cut])
        for token in tokens[cut:]:
            assert resumed.forced()[:1] in ([], [token])
            assert resumed.accept(token)
        assert resumed.mask() == alone.mask()
        assert resumed.forced() == alone.forced()
        assert resumed.ended == alone.ended


def test_resuming_at_every_position_gives_the_same_masks(smollm2: Model) -> None:
    grammar = grammars.json_schema(PERSON)
    tokens = smollm2.encode('{"name": "Jöhn 漢", "age": 23}')
    through = smollm2.grammars.compile(grammar)
    rows = through.masks([*tokens, smollm2.end])
    assert len(rows) == len(tokens) + 1
    for cut in range(len(tokens) + 1):
        resumed = smollm2.grammars.compile(grammar)
        assert all(resumed.accept(token) for token in tokens[:cut])
        assert resumed.mask() == rows[cut]
    assert set(smollm2.allowed(rows[-1])) == set(smollm2.record.eos_token_ids)


def test_masks_of_a_draft_are_those_after_accepting_it(smollm2: Model) -> None:
    """Up to the refused token; the matcher stays where it was, also when it asks again."""
    for seed in range(40_000, 40_030):
        grammar = grammars.json_schema(Schemas(seed).draw())
        matcher, random = smollm2.grammars.compile(grammar), Random(seed)
        tokens = smollm2.write(smollm2.grammars.compile(grammar), seed)
        start = random.randrange(len(tokens))
        assert all(matcher.accept(token) for token in tokens[:start])
        before = matcher.mask()
        draft = tokens[start : start + 6]
        right = len(draft)
        if seed % 2:
            right = random.randrange(len(draft))
            step = smollm2.grammars.compile(grammar)
            assert all(step.accept(token) for token in tokens[: start + right])
            allowed = set(smollm2.allowed(step.mask()))
            refused = (t for t in range(smollm2.record.vocab_size) if t not in allowed)
            draft[right:] = [next(t for t in refused if not step.accept(t)), 0]
        rows = matcher.masks(draft)
        assert len(rows) == right + 1
        assert matcher.mask() == before
        for token, row in zip([*draft[:right], None], rows, strict=True):
            assert matcher.mask() == row
            assert token is None or matcher.accept(token)


def test_a_refused_token_changes_nothing(smollm2: Model) -> None:
    matcher = smollm2.grammars.compile(grammars.json_schema(PERSON))
    for token in [*smollm2.encode('{"name": "A'), smollm2.end]:
        mask, run = matcher.mask(), matcher.forced()
        for wrong in (-1, smollm2.record.vocab_size, 10**9, *smollm2.encode("\n"), smollm2.end):
            assert not matcher.accept(wrong)
        assert (matcher.mask(), matcher.forced()) == (mask, run)
        assert matcher.accept(token) is (token != smollm2.end)
    assert not matcher.ended


def test_an_end_is_any_of_the_models_and_final(tiny: Model) -> None:
    several = Model(replace(tiny.record, eos_token_ids=(2, 0)))
    for end in (2, 0):
        matcher = several.grammars.compile(grammars.regex("ab?"))
        assert not matcher.accept(end)
        assert matcher.accept(several.encode("a")[0])
        assert {0, 2} < set(several.allowed(matcher.mask()))
        assert not matcher.ended
        assert matcher.accept(end)
        assert matcher.ended
        assert list(several.allowed(matcher.mask())) == [0, 2]
        assert matcher.forced() == []
        assert not matcher.accept(several.encode("b")[0])


def test_a_model_without_an_end_stops_where_the_grammar_does(tiny: Model) -> None:
    endless = Grammars(replace(tiny.record, eos_token_ids=()))
    matcher = endless.compile(grammars.regex("ab"))
    assert all(matcher.accept(token) for token in tiny.encode("ab"))
    assert matcher.ended
    assert not any(matcher.mask())


@pytest.mark.parametrize("rows", [300, 320, 355, 356, 384, 1_000])
def test_masks_have_the_models_size_whatever_the_tokenizer_has(tiny: Model, rows: int) -> None:
    """Models pad their vocabulary, or have no row for a token that was added later."""
    sized = Model(replace(tiny.record, vocab_size=rows))
    matcher = sized.grammars.compile(grammars.regex("(?s).*"))
    mask = matcher.mask()
    assert len(mask) == (rows + 31) // 32 * 4
    assert max(sized.allowed(mask)) < min(rows, tiny.record.vocab_size)
    assert not matcher.accept(rows)
    endless = Grammars(replace(tiny.record, vocab_size=rows, eos_token_ids=()))
    only_text = sized.allowed(endless.compile(grammars.regex("(?s).*")).mask())
    assert set(sized.allowed(mask)) - set(only_text) == {sized.end}


def test_forced_text_is_spelled_as_it_stands() -> None:
    """Also where the tokenizer composes characters, or puts a space in front of a text."""
    tokenizer = Tokenizer.from_str(tiny_tokenizer().to_str())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    model = Model(make_record(tokenizer=tokenizer))
    text = "the quick e\u0301cole"
    matcher = model.grammars.compile(grammars.choice([text]))
    run = matcher.forced()
    assert (
        model.tokenizer.decode_bytes(run) == text.encode()[: len(model.tokenizer.decode_bytes(run))]
    )
    assert len(run) > 3
    assert all(matcher.accept(token) for token in run)
    assert not matcher.failure


@pytest.mark.parametrize("broken", [b"{}", b"", b"\xff", b'{"model":{"vocab":{"a":0}}}'])
def test_a_vocabulary_that_cannot_be_read_is_told(tiny: Model, broken: bytes) -> None:
    with pytest.raises(CallerError, match="not available with tiny") as told:
        Grammars(replace(tiny.record, tokenizer_json=broken))
    assert told.value.code == "grammar_unsupported"


def test_an_end_that_texts_contain_is_allowed_at_the_end_only() -> None:
    """A tokenizer may not mark its end token as special: it must not end a JSON string."""
    tokenizer = Tokenizer.from_str(tiny_tokenizer().to_str())
    tokenizer.add_tokens([AddedToken("stop!", normalized=False)])
    end = tokenizer.token_to_id("stop!")
    model = Model(replace(make_record(tokenizer=tokenizer), eos_token_ids=(end,)))
    matcher = model.grammars.compile(grammars.json_schema({"type": "string"}))
    for token in model.encode('"a"'):
        assert end not in model.allowed(matcher.mask())
        assert not matcher.accept(end)
        assert matcher.accept(token)
    assert list(model.allowed(matcher.mask())) == [end]
    assert matcher.accept(end)


EXPLODES = "\n".join(
    ['start: "b" | "a" r0', *(f"r{i}: r{i + 1} r{i + 1}" for i in range(40)), 'r40: "x"?']
)


def test_a_draft_into_what_is_too_complex_does_no_harm(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = grammars.LLParserLimits(max_items_in_row=60, verbose_errors=False)
    monkeypatch.setattr(grammars, "LIMITS", limits)
    compiler = Grammars(tiny.record)
    grammar = grammars.lark(EXPLODES)
    matcher = compiler.compile(grammar)
    before = matcher.mask()
    assert len(matcher.masks(tiny.encode("ax"))) == 1
    assert matcher.failure == ""
    assert matcher.mask() == before
    assert matcher.accept(tiny.encode("b")[0])
    assert matcher.ended

    unlucky = compiler.compile(grammar)
    unlucky.accept(tiny.encode("a")[0])
    assert not any(unlucky.mask())
    assert "too many" in unlucky.failure.lower() or "items" in unlucky.failure
    assert not unlucky.accept(tiny.encode("x")[0])
    assert unlucky.forced() == []
    assert not unlucky.ended
    assert compiler.compile(grammar).mask() == before


def test_compiling_beside_a_running_matcher_disturbs_nothing(smollm2: Model) -> None:
    grammar = grammars.json_schema(PERSON)
    tokens = smollm2.encode('{"name": "Ada Lovelace", "age": 36}')
    rows = smollm2.grammars.compile(grammar).masks(tokens)
    wrong: list[int] = []

    def run(which: int) -> None:
        for _ in range(10):
            matcher = smollm2.grammars.compile(grammar)
            smollm2.grammars.compile(grammars.choice([f"option {which}", "other"])).mask()
            if matcher.masks(tokens) != rows:
                wrong.append(which)

    threads = [threading.Thread(target=run, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# what the callers' texts mean


def test_json_has_one_space_after_colon_and_comma_and_no_other(smollm2: Model) -> None:
    grammar = grammars.json_object()
    for value in ({}, {"a": [1, {"b": None}], "ß": "x y"}, {"a": {"b": {"c": [True, 1.5e3]}}}):
        assert smollm2.takes(grammar, json.dumps(value, ensure_ascii=False))
    for text in ('{"a":1}', '{"a" : 1}', '{ "a": 1}', '{"a": 1,"b": 2}', "[1]", "null", '"a"', ""):
        assert not smollm2.takes(grammar, text)
    assert not smollm2.takes(grammar, '{"\\u0061": 1}'), "every key has one spelling"


def test_objects_take_the_listed_keys_unless_they_are_combined(smollm2: Model) -> None:
    person = grammars.json_schema(PERSON)
    assert smollm2.takes(person, '{"name": "A", "age": 1}')
    assert not smollm2.takes(person, '{"name": "A", "age": 1, "more": 1}')
    assert not smollm2.takes(person, '{"name": "A"}')
    opened = grammars.json_schema(PERSON | {"additionalProperties": True})
    assert smollm2.takes(opened, '{"name": "A", "age": 1, "more": 1}')
    halves = {"allOf": [PERSON, {"properties": {"more": {"type": "integer"}}}]}
    assert smollm2.takes(grammars.json_schema(halves), '{"name": "A", "age": 1, "more": 1}')


CAT = {"type": "object", "properties": {"pet": {"const": "cat"}, "lives": {"type": "integer"}}}
DOG = {"type": "object", "properties": {"pet": {"enum": ["dog", "pup"]}}}


def test_alternatives_that_exclude_each_other_may_be_references(smollm2: Model) -> None:
    """As typed clients write unions with a discriminator, and values that may be null."""
    defs = {"cat": CAT | {"required": ["pet", "lives"]}, "dog": DOG | {"required": ["pet"]}}
    pets = {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}, {"type": "null"}]}
    grammar = grammars.json_schema({"$defs": defs} | pets)
    for text in ('{"pet": "cat", "lives": 9}', '{"pet": "pup"}', "null"):
        assert smollm2.takes(grammar, text)
    for text in ('{"pet": "cat"}', '{"pet": "dog", "lives": 9}', '{"pet": "cow"}', "1"):
        assert not smollm2.takes(grammar, text)


def test_alternatives_in_doubt_are_not_made_to_differ(smollm2: Model) -> None:
    """Closing the objects would let through what the caller's schema finds twice."""
    open_ = [
        {"type": "object", "properties": {"a": {}}},
        {"type": "object", "properties": {"b": {}}},
    ]
    required = [option | {"required": [key]} for option, key in zip(open_, "ab", strict=True)]
    for schema in ({"oneOf": open_}, {"oneOf": required}, {"oneOf": [CAT, {"const": {}}]}):
        with pytest.raises(CallerError, match="write anyOf"):
            smollm2.grammars.compile(grammars.json_schema(schema))


REFUSED = [
    ({"type": "array", "uniqueItems": True}, "'uniqueItems' is not supported"),
    ({"not": {"type": "null"}}, "'not' is not supported"),
    ({"if": {}, "then": {}}, "'if' is not supported"),
    ({"type": "object", "propertyNames": {"pattern": "a"}}, "'propertyNames' is not supported"),
    ({"type": "array", "contains": {}}, "'contains' is not supported"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "'dependentRequired'"),
    ({"type": "object", "unevaluatedProperties": False}, "'unevaluatedProperties'"),
    ({"type": "string", "nullable": True}, "type: .*'null'"),
    ({"type": "string", "maxlength": 3}, "'maxlength' is not supported"),
    ({"properties": {"a/b": {"minimun": 3}}}, "at #/properties/a~1b: 'minimun'"),
    ({"type": "string", "format": "iri"}, "format 'iri' is not supported; supported: date"),
    ({"type": "objekt"}, "'objekt' is not one of"),
    ({"type": []}, "is not one of"),
    ({"items": [{"type": "string"}]}, "prefixItems"),
    ({"enum": []}, "not empty"),
    ({"anyOf": []}, "not empty"),
    ({"const": 2**53 + 1}, "beyond"),
    ({"type": "integer", "minimum": 10**30}, "beyond"),
    ({"type": "number", "minimum": True}, "expected a number"),
    ({"exclusiveMinimum": True}, "expected a number"),
    ({"minLength": -1}, "expected a count"),
    ({"minLength": 1.5}, "expected a count"),
    ({"multipleOf": 0}, "above 0"),
    ({"required": "a"}, "list of names"),
    ({"const": "a\x01"}, r"U\+0001"),
    ({"const": float("nan")}, "beyond"),
    ({"const": 0.1 + 0.2}, "more than 15 digits"),
    ({"$ref": "https://example.com/schema"}, "references within the schema"),
    ({"$ref": "#/$defs/nowhere"}, "no schema at '#/\\$defs/nowhere'"),
    ({"$ref": "#"}, "no finite value"),
    ({"properties": {"a": {"$ref": "#"}}, "type": "object", "required": ["a"]}, "no finite value"),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "no finite value"),
    ({"type": "object", "minProperties": 2}, "minProperties beyond"),
    ({"properties": {"a": {"$id": "x"}}}, "'\\$id' is not supported"),
    ({"type": "string", "pattern": "(?=a)"}, "look-ahead"),
    ({"type": "string", "pattern": r"(a)\1"}, "backreferences"),
    ({"type": "string", "pattern": r"\bword"}, "word boundaries"),
    ({"type": "string", "pattern": r"\Aa"}, r"escape \\A"),
    ({"type": "string", "pattern": "[a--b]"}, "'--' in a character class"),
    ({"type": "string", "pattern": "[]a]"}, "empty character classes"),
    ({"type": "string", "pattern": "(?i)a"}, "groups that begin with"),
    ({"type": "string", "pattern": "a++"}, "possessive"),
    ({"type": "string", "pattern": "a{,3}"}, "lower bound"),
    ({"type": "string", "pattern": "a\\"}, "backslash at the end"),
    ({"type": "string", "pattern": "[a"}, "without an end"),
    (False, "expected an object"),
    ([], "expected an object"),
]


@pytest.mark.parametrize(("schema", "said"), REFUSED, ids=str)
def test_what_cannot_be_enforced_is_refused_by_name(schema: object, said: str) -> None:
    with pytest.raises(CallerError, match=said) as told:
        grammars.json_schema(schema)  # type: ignore[arg-type]  # some are wrong on purpose
    assert told.value.code == "invalid_grammar"
    assert told.value.status == 400


COMPILE_REFUSED = [
    (grammars.json_schema({"oneOf": [{"type": "object"}, {"type": "object"}]}), "write anyOf"),
    (grammars.json_schema({"type": "integer", "minimum": 5, "maximum": 4}), "(?i)unsatisfiable"),
    (grammars.json_schema({"type": "string", "pattern": "a("}), "unclosed group"),
    (grammars.regex("a[b"), "unclosed character class"),
    (grammars.regex("a(?!b)"), "look-around"),
    (grammars.regex(r"(a)\1"), "backreferences are not supported"),
    (grammars.regex(r"a\b"), "not supported"),
    (grammars.lark("start: thing"), 'unknown name: "thing"'),
    (grammars.lark("begin: 'a'"), r"1\(\d+\)"),
    (grammars.lark('start: "a'), r"1\(\d+\)"),
    (grammars.lark('start: start "a"'), "no text matches"),
    ("start: 'a'", "not a serialized grammar"),
    ('{"grammars":', "EOF"),
]


@pytest.mark.parametrize(("grammar", "said"), COMPILE_REFUSED, ids=str)
def test_what_cannot_be_compiled_says_where_it_is_wrong(
    tiny: Model, grammar: str, said: str
) -> None:
    with pytest.raises(CallerError, match=said) as told:
        tiny.grammars.compile(grammar)
    assert told.value.code == "invalid_grammar"


def test_texts_that_are_too_long_are_refused_before_they_are_read() -> None:
    long = "a" * (grammars.GRAMMAR_BYTES_MAX + 1)
    for build in (grammars.regex, grammars.lark, lambda text: grammars.choice([text])):
        with pytest.raises(CallerError) as told:
            build(long)
        assert told.value.code == "grammar_too_complex"
    with pytest.raises(CallerError) as told:
        grammars.json_schema({"enum": [long]})
    assert told.value.code == "grammar_too_complex"


def test_half_a_character_is_no_text() -> None:
    for build in (
        grammars.regex,
        grammars.lark,
        lambda text: grammars.json_schema({"const": text}),
    ):
        with pytest.raises(CallerError, match="Unicode"):
            build("\ud800")


def test_checking_a_checked_schema_changes_nothing() -> None:
    for seed in range(200):
        once = checked_schema(Schemas(seed).draw())
        assert checked_schema(once) == once


def test_annotations_are_dropped_and_number_formats_are_bounds(smollm2: Model) -> None:
    schema = {
        "$id": "https://example.com/x",
        "type": "object",
        "x-order": 1,
        "properties": {
            "small": {"type": "integer", "format": "uint8", "deprecated": True},
            "real": {"type": "number", "format": "double", "default": 1},
            "title": {"type": "string", "title": "a keyword as a name", "examples": ["x"]},
        },
        "required": ["small", "real", "title"],
    }
    grammar = grammars.json_schema(schema)
    assert smollm2.takes(grammar, '{"small": 255, "real": 1.5, "title": "x"}')
    assert not smollm2.takes(grammar, '{"small": 256, "real": 1.5, "title": "x"}')
    assert not smollm2.takes(grammar, '{"small": -1, "real": 1.5, "title": "x"}')


def test_a_number_cannot_round_to_a_bound_it_must_not_reach(smollm2: Model) -> None:
    grammar = grammars.json_schema({"type": "number", "exclusiveMaximum": 5})
    assert smollm2.takes(grammar, "4.99")
    assert not smollm2.takes(grammar, "5")
    assert not smollm2.takes(grammar, "4.99999999999999999999999999")
    grammar = grammars.json_schema({"type": "number", "maximum": 1022.0029999999999})
    assert smollm2.takes(grammar, "1022.001")
    assert not smollm2.takes(grammar, "1022.003")


PATTERNS = [r"^\W$", r"^[^\W]$", r"^\s$", r"^\S$", r"^[^\s]$", r"^\D$", r"^[^\D]$", r"^.$", r"^\w$"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_allows_nothing_that_another_reader_would_refuse(
    smollm2: Model, pattern: str
) -> None:
    """Python reads the classes of `\\w`, `\\s` and `\\d` as Unicode, ECMA-262 as ASCII."""
    grammar = grammars.json_schema({"type": "string", "pattern": pattern})
    candidates = "a_Z9 é漢١²\u00a0\u0085\u200b\ufeff\u2028\u3000-!ⓐ😀\u0301\u200d{[&~"
    taken = [c for c in candidates if smollm2.takes(grammar, json.dumps(c, ensure_ascii=False))]
    assert taken, "the pattern allows something"
    assert [c for c in taken if not re.search(pattern, c)] == []
    assert [c for c in taken if not re.search(pattern, c, re.ASCII)] == []


def test_a_regular_expression_spans_the_whole_text(smollm2: Model) -> None:
    for pattern, right, wrong in (
        ("a/b|c", ["a/b", "c"], ["a", "a/bc", "xc"]),
        (r"a\/b", ["a/b"], [r"a\/b"]),
        (r"a\\/b", [r"a\/b"], ["a/b"]),
        ("^(x|y)$", ["x", "y"], ["xy", ""]),
        (r"\d{4}-\d\d", ["2024-02"], ["2024-2", "12024-02"]),
        ("a.c", ["abc", "a😀c"], ["a\nc"]),
        ("(?i)yes", ["yes", "YeS"], ["no"]),
        (r"\p{Greek}+", ["αβγ"], ["abc"]),
        ("x\ny", ["x\ny"], ["xy"]),
        ("a/i", ["a/i"], ["A"]),
    ):
        grammar = grammars.regex(pattern)
        assert [text for text in right if not smollm2.takes(grammar, text)] == []
        assert [text for text in wrong if smollm2.takes(grammar, text)] == []


def test_a_choice_is_literal(smollm2: Model) -> None:
    texts = [
        'a"b', "a\\n", "new\nline", "tab\t", "nul\0", "é漢😀", "(x)*|y", "//", "it's", "%json",
        "/x/", "\x7f\x80\u2028", "yes", "yes!", "<b>", "a.c", " spaced ", "[0-9]", "$^", "#",
    ]  # fmt: skip
    grammar = grammars.choice(texts)
    assert [text for text in texts if not smollm2.takes(grammar, text)] == []
    wrong = ["", "ye", "nul", "abc", "x", "5", "spaced"]
    assert [text for text in wrong if smollm2.takes(grammar, text)] == []
    for bad in ([], [""], ["a", "a"], ["a", 1]):
        with pytest.raises(CallerError, match="choice"):
            grammars.choice(bad)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(CallerError, match="at least one"):
        grammars.regex("")


def test_lark_holds_its_json_to_the_same_checks(smollm2: Model) -> None:
    call = f'start: "call " name " " args\nname: "f" | "g"\nargs: {grammars.json_in_lark(PERSON)}'
    plain = 'start: "call " NAME " " %json {"properties": {"a": {"const": 1}}, "required": ["a"]}'
    for grammar, right, wrong in (
        (grammars.lark(call), 'call f {"name": "x", "age": 3}', 'call f {"name": "x"}'),
        (grammars.lark(plain + "\nNAME: /[a-z]+/"), 'call it {"a": 1}', 'call it {"a":1}'),
        (grammars.lark('start: "%json {" // %json x\n | /%json [{]}/'), "%json {", "{}"),
    ):
        assert smollm2.takes(grammar, right)
        assert not smollm2.takes(grammar, wrong)
    lenient = 'start: %json {"type": "object", "foo": 1, "x-guidance": {"lenient": true}}'
    with pytest.raises(CallerError, match="'foo' is not supported"):
        grammars.lark(lenient)
    with pytest.raises(CallerError, match="%json needs"):
        grammars.lark("start: %json {")


def test_a_long_text_is_forced_piece_by_piece(tiny: Model) -> None:
    text = "the quick brown fox " * 400
    matcher = tiny.grammars.compile(grammars.choice([text]))
    tokens: list[int] = []
    while run := matcher.forced():
        assert len(run) <= grammar_matcher.FORCED_TOKENS_MAX
        assert all(matcher.accept(token) for token in run)
        tokens += run
    assert len(tokens) > 2 * grammar_matcher.FORCED_TOKENS_MAX
    assert text.startswith(tiny.text(tokens))
    assert len(text) - len(tiny.text(tokens)) < 20
