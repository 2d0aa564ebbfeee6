"""Tokenizers read from GGUF files: token for token what the reference gives, on hard texts."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from headrace.errors import ModelError
from headrace_gateway.tokens import Chain, chain_of
from headrace_worker.loading import LoadedModel
from headrace_worker.loading.byte_level import RULES
from headrace_worker.loading.tokenizer import from_gguf
from worker.builders import split_as_named
from worker.corpus import HARD_TEXTS

TEXTS = st.text(max_size=60) | st.text("aeht ▁\n\t\r0123'é\u0301漢😀.,<>|_", max_size=40)
CORPUS = [
    *HARD_TEXTS,
    "  hi",
    " hi",
    "▁▁ spelled ▁",
    "<s>[INST] hello [/INST]</s> bye",
    "<start_of_turn>user\nhi<end_of_turn>\n",
    "\n\n\n\n<table> <tool>x</tool>",
    "<0x0A> <0xZZ> <unk>",
    "e\u0301e\u0301 \u1100\u1161\u11a8 ﬃ ①",
    "a" * 2_000,
    "\u202ertl\u202c \u0628\u0650\u0633\u0652\u0645\u0650",
    "\ue000\ufffe\uffff\U000e0001",
]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
VOCAB = 1_200


def metadata_of(tokenizer: dict[str, Any], architecture: str = "llama") -> dict[str, Any]:
    return {"general.architecture": architecture} | {
        f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()
    }


def ours(tokenizer: dict[str, Any], architecture: str = "llama") -> Tokenizer:
    facts = from_gguf(metadata_of(tokenizer, architecture), len(tokenizer["tokens"]))
    return Tokenizer.from_str(facts.json.decode())


def theirs(path: Path, tokenizer: dict[str, Any], architecture: str = "llama") -> Any:
    """transformers' tokenizer of a GGUF file with this metadata."""
    from transformers.integrations.gguf import gguf_tokenizer_mapping as reader
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    writer = GGUFWriter(path, architecture)
    for key, value in metadata_of(tokenizer).items():
        if key.startswith("tokenizer."):
            writer.add_key_value(key, value, GGUFValueType.get_type(value))
    writer.add_tensor("token_embd.weight", np.zeros((1, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    name, facts, _ = reader.get_gguf_tokenizer(str(path))
    return TokenizersBackend(tokenizer_object=reader.convert_gguf_tokenizer(name, facts)[0])


def assert_same_tokens(mine: Tokenizer, reference: Any, texts: list[str]) -> None:
    for text in texts:
        ids = mine.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text, add_special_tokens=False), repr(text)
        for skip in (False, True):
            decoded = reference.decode(ids, skip_special_tokens=skip)
            assert mine.decode(ids, skip_special_tokens=skip) == decoded, repr(text)


def test_the_real_tokenizer_equals_the_reference(smollm2: LoadedModel, hf_tokenizer: Any) -> None:
    """Token for token over scripts, emoji, code, whitespace and special tokens in the text."""
    mine = Tokenizer.from_str(smollm2.record.tokenizer_json.decode())
    assert_same_tokens(mine, hf_tokenizer, CORPUS)
    assert mine.get_vocab_size() == 49152


@cache
def byte_vocabulary() -> dict[str, Any]:
    """A byte-level vocabulary whose merges know no words: where text is split shows everywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|begin|>", "<|end|>", "<｜User｜>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=12,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "model": "gpt2",
        "tokens": [*tokens, "<tool>", "e\u0301 plain"],
        "token_type": [CONTROL] * 5 + [NORMAL] * (len(tokens) - 5) + [USER_DEFINED] * 2,
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


@pytest.mark.parametrize("pre", RULES)
def test_each_splitting_rule_equals_the_reference(tmp_path: Path, pre: str) -> None:
    """One vocabulary under each rule, with control and user-defined tokens."""
    vocabulary = byte_vocabulary() | {"pre": pre}
    # transformers leaves out special tokens beyond ASCII, and spells such added ones in bytes
    ascii_only = vocabulary | {"token_type": list(vocabulary["token_type"])}
    ascii_only["token_type"][2] = ascii_only["token_type"][-1] = NORMAL
    reference = split_as_named(theirs(tmp_path / "m.gguf", ascii_only), pre)
    assert_same_tokens(ours(ascii_only), reference, CORPUS)


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_each_splitting_rule_equals_the_reference_on_any_text(tmp_path: Path, pre: str) -> None:
    vocabulary = byte_vocabulary() | {"pre": pre, "token_type": [NORMAL] * (VOCAB + 2)}
    mine = ours(vocabulary)
    reference = split_as_named(theirs(tmp_path / "m.gguf", vocabulary), pre)

    @settings(max_examples=150, deadline=None, database=None)
    @given(TEXTS)
    def check(text: str) -> None:
        assert_same_tokens(mine, reference, [text])

    check()


def test_the_rules_differ_on_these_texts() -> None:
    """The comparisons above can tell the rules apart: no two of the kinds give the same tokens."""
    kinds = ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"]
    seen = []
    for pre in kinds:
        mine = ours(byte_vocabulary() | {"pre": pre})
        seen.append([mine.encode(text, add_special_tokens=False).ids for text in CORPUS])
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


def test_special_tokens_are_found_in_the_text_whatever_their_script() -> None:
    """DeepSeek's have bars beyond ASCII; user-defined ones are matched as they stand."""
    mine = ours(byte_vocabulary() | {"pre": "qwen2"})
    ids = mine.encode("a<｜User｜>b<tool>", add_special_tokens=False).ids
    assert ids[1] == 2 and ids[-1] == VOCAB
    assert mine.decode(ids, skip_special_tokens=True) == "ab<tool>"


def test_a_word_that_is_a_token_is_one_where_the_model_says_so() -> None:
    """Llama 3 and Tekken look a word up before they merge; a merge may not lead there."""
    vocabulary = byte_vocabulary()
    tokens = [*vocabulary["tokens"], "xyzzyq"]
    vocabulary = vocabulary | {"tokens": tokens, "token_type": None}
    for pre, whole in {"llama-bpe": True, "tekken": True, "qwen2": False, "gpt-2": False}.items():
        ids = ours(vocabulary | {"pre": pre}).encode("xyzzyq", add_special_tokens=False).ids
        assert (ids == [len(tokens) - 1]) is whole, pre


@cache
def pieces() -> dict[str, Any]:
    """A SentencePiece vocabulary: specials, bytes, joined pieces by score, single characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 259, limit_alphabet=150, max_token_length=12, show_progress=False
    )
    tokenizer.train_from_iterator([f" {text}" for text in CORPUS * 2], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    joined = ["".join(pair) for pair in model["merges"]]
    single = sorted(piece for piece in model["vocab"] if len(piece) == 1)
    single += [] if "▁" in single else ["▁"]
    normal = [*dict.fromkeys(joined), *single]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *normal]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(normal))]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(normal)
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def added(vocabulary: dict[str, Any], extra: dict[str, int]) -> dict[str, Any]:
    """`vocabulary` with more tokens, by type, as converters append them."""
    return vocabulary | {
        "tokens": [*vocabulary["tokens"], *extra],
        "scores": [*vocabulary["scores"], *[-1000.0] * len(extra)],
        "token_type": [*vocabulary["token_type"], *extra.values()],
    }


def sentencepiece_ids(text: str) -> list[int]:
    """SentencePiece's BPE a step at a time: join the best-scoring neighbours, the left first."""
    vocabulary = pieces()
    ids = {token: i for i, token in enumerate(vocabulary["tokens"])}
    joinable = {t: vocabulary["scores"][i] for t, i in ids.items() if i > 258}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        unions = [a + b for a, b in pairwise(symbols)]
        scored = [(joinable[union], -i) for i, union in enumerate(unions) if union in joinable]
        if not scored:
            break
        at = -max(scored)[1]
        symbols[at : at + 2] = [unions[at]]
    found: list[int] = []
    for symbol in symbols:
        spelled = [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        found += [ids[symbol]] if symbol in ids else spelled
    return found


def test_pieces_are_joined_as_sentencepiece_joins_them() -> None:
    """Llama 2's kind against the algorithm itself: spaces in front, bytes, runs, long words."""
    mine = ours(pieces())
    texts = [text for text in CORPUS if not any(s in text for s in ("<s>", "</s>", "<unk>"))]
    assert len(texts) > 150
    for text in texts:
        assert mine.encode(text, add_special_tokens=False).ids == sentencepiece_ids(text), text


@given(TEXTS)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_text_is_joined_as_sentencepiece_joins_it(text: str) -> None:
    mine = _llama2()
    assert mine.encode(text, add_special_tokens=False).ids == sentencepiece_ids(text)


@cache
def _llama2() -> Tokenizer:
    return ours(pieces())


def test_decoding_gives_the_text_back() -> None:
    """The space that was put in front goes, the text's own stay; ▁ itself reads as a space."""
    mine = ours(pieces())
    for text in CORPUS:
        ids = mine.encode(text, add_special_tokens=False).ids
        if not any(special in text for special in ("<s>", "<unk>")):
            assert mine.decode(ids, skip_special_tokens=False) == text.replace("▁", " "), text
    facts = from_gguf(metadata_of(pieces()), VOCAB + 99)
    expected = Chain((("▁", " "),), byte_fallback=True, strip=" ", strip_max=1)
    assert chain_of(json.loads(facts.json)["decoder"]) == expected, "gateways stream it exactly"


def test_every_stretch_between_special_tokens_gets_its_space() -> None:
    """As SentencePiece and llama.cpp do it, and Llama 2's tokenizer.json."""
    mine = ours(pieces())
    said = [mine.id_to_token(i) for i in mine.encode("<s>a</s> a", add_special_tokens=False).ids]
    assert said[0] == "<s>" and "".join(said[1:]) == "▁a</s>▁▁a"


EXTRA = {"<tool>": USER_DEFINED, "\n\n": USER_DEFINED, "<start_of_turn>": CONTROL}


def test_phi3_s_pieces_equal_the_reference(tmp_path: Path) -> None:
    """As transformers builds them; that its special tokens swallow spaces it does not know."""
    vocabulary = added(pieces(), EXTRA)
    reference = theirs(tmp_path / "m.gguf", vocabulary, "phi3")
    # the reference has the unknown token as a piece like others
    assert_same_tokens(ours(vocabulary), reference, [t for t in CORPUS if "<unk>" not in t])


def gemma_pieces() -> dict[str, Any]:
    """Gemma's own special tokens, and runs of spaces in front, as llama.cpp writes them."""
    vocabulary = pieces()
    kept = [i for i, text in enumerate(vocabulary["tokens"]) if i > 258 and text.strip("▁")]
    names = {"<unk>": UNKNOWN, "<bos>": CONTROL, "<eos>": CONTROL, "<pad>": CONTROL}
    names |= {"<mask>": CONTROL} | dict.fromkeys(vocabulary["tokens"][3:259], BYTE)
    names |= {" " * count: USER_DEFINED for count in range(2, 32)} | {"▁": NORMAL}
    names |= {vocabulary["tokens"][i]: NORMAL for i in kept}
    empty = vocabulary | {"tokens": [], "scores": [], "token_type": []}
    return added(empty, names | EXTRA) | {"add_space_prefix": False}


def test_gemma_s_pieces_equal_the_reference(tmp_path: Path) -> None:
    """No space in front, merges by position, runs of spaces as pieces: as transformers does it."""
    vocabulary = gemma_pieces()
    mine = ours(vocabulary, "gemma3")
    assert_same_tokens(mine, theirs(tmp_path / "m.gguf", vocabulary, "gemma3"), CORPUS)
    for run in (1, 2, 5, 31):
        ids = mine.encode(" " * run + "a", add_special_tokens=False).ids
        assert mine.decode(ids) == " " * run + "a"
        assert run == 1 or len(ids) == 2


def test_phi3_s_special_tokens_swallow_what_follows() -> None:
    """`<|user|>` and a newline are one token, as its tokenizer.json says and the file does not."""
    vocabulary = added(pieces(), {"<|user|>": CONTROL, "<|endoftext|>": CONTROL})
    for architecture, same in {"phi3": True, "llama": False}.items():
        mine = ours(vocabulary, architecture)
        plain = mine.encode("<|user|>hi", add_special_tokens=False).ids
        assert (mine.encode("<|user|>\n hi", add_special_tokens=False).ids == plain) is same
    mine = ours(vocabulary, "phi3")
    kept = mine.encode("<|endoftext|>\nhi", add_special_tokens=False).ids
    assert mine.decode(kept) == "\nhi"


def test_the_facts_beside_the_tokenizer() -> None:
    """BOS by kind where the file is silent, every end that it names or is known to have."""

    def facts(tokenizer: dict[str, Any], architecture: str = "llama", **more: Any) -> Any:
        metadata = metadata_of(tokenizer | more, architecture)
        return from_gguf(metadata, len(tokenizer["tokens"]))

    assert facts(pieces()).add_bos and not facts(pieces(), add_bos_token=False).add_bos
    rules = byte_vocabulary()
    assert facts(rules, pre="llama-bpe").add_bos and facts(rules, pre="tekken").add_bos
    assert not facts(rules, pre="qwen2").add_bos and facts(rules, pre="qwen2", add_bos_token=True)
    assert facts(rules, pre="qwen2").eos_token_ids == (1, 3, 4), "<|im_end|> ends a turn"
    gemma = added(pieces(), {"<end_of_turn>": CONTROL, "<|end|>": NORMAL})
    end = gemma["tokens"].index("<end_of_turn>")
    assert facts(gemma, "gemma3").eos_token_ids == (2, end), "not what is text"
    named = facts(pieces(), eot_token_id=7, eom_token_id=8, padding_token_id=0)
    assert named.eos_token_ids == (2, 7, 8) and named.bos_token_id == 1
    assert named.template_tokens["pad_token"] == "<unk>"
    assert facts(pieces(), eos_token_id=1 << 30).eos_token_ids == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "t5"}, "tokenizer 't5' with pre-tokenizer None is not supported"),
        ({"model": "gpt2", "pre": "default"}, "'gpt2' with pre-tokenizer 'default' is not supp"),
        ({"model": "gpt2", "pre": "gpt-2"}, r"the file has no tokenizer\.ggml\.merges"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["a nowhere"]}, "the file's tokenizer is br"),
        ({"tokens": ["a"]}, "token_type does not hold a number for each token"),
        ({"tokens": 7}, r"the file has no tokenizer\.ggml\.tokens"),
        ({"scores": [float("nan")] * VOCAB}, "scores does not hold a number for each token"),
    ],
)
def test_a_tokenizer_that_cannot_be_run_is_refused_by_name(
    change: dict[str, Any], message: str
) -> None:
    """Before any weight is read, and with what would work."""
    with pytest.raises(ModelError, match=message) as caught:
        from_gguf(metadata_of(pieces() | change), VOCAB + 99)
    assert caught.value.code == "tokenizer"


def test_tokens_without_embeddings_are_refused() -> None:
    """A prompt could name a row that the model does not have."""
    with pytest.raises(ModelError, match=r"the file has \d+ tokens and embeddings for 1000"):
        from_gguf(metadata_of(pieces()), 1_000)
