"""Promise 6 for every family: tiny random models of odd shapes, against transformers.

`FAMILIES` run through the engine in every way that it computes; `VARIANTS` are more shapes and
rotary scalings of the same code, of which the logits are compared. Weights are seeded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.errors import ModelError
from headrace.types import FinishReason
from headrace_worker.loading import LoadedModel, load_model, memory
from headrace_worker.loading.hf_config import read_config
from headrace_worker.model import ARCHITECTURES, norms
from headrace_worker.policy.speculation import Guesser
from worker.builders import (
    Output,
    finish_all,
    guesses_from,
    logits_of,
    make_engine,
    make_job,
    random_tokens,
    tiny_tokenizer,
)
from worker.conftest import NEW_TOKENS, greedy

VOCAB = 311
WINDOW = 21
PROMPT_LENGTHS = (5, 16, 33, 61, 90)
"""The last are longer than the windows, and than LongRoPE's short context where it is 4."""

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_RARE = {
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.1,
    "truncate": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LOCAL_AND_GLOBAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 8.0},
}


def config_of(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **(SHAPE | changes))


def llama(**changes: Any) -> Any:
    return config_of("llama", head_dim=20, **changes)


def llama_with(kind: str, **rules: Any) -> Callable[[], Any]:
    return lambda: llama(rope_parameters={"rope_type": kind, "rope_theta": 10_000.0} | rules)


def smollm3(**changes: Any) -> Any:
    return config_of("smollm3", no_rope_layers=[0, 1, 1], tie_word_embeddings=True, **changes)


def mistral() -> Any:
    return config_of("mistral", head_dim=10, sliding_window=WINDOW)


def qwen2() -> Any:
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    return config_of("qwen2", num_key_value_heads=3, **window)


def qwen3(**changes: Any) -> Any:
    return config_of("qwen3", head_dim=20, tie_word_embeddings=True, **changes)


def qwen3_moe(**changes: Any) -> Any:
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    changes = {"norm_topk_prob": True, "mlp_only_layers": [1]} | changes
    return config_of("qwen3_moe", head_dim=10, **experts, **changes)


def mixtral() -> Any:
    return config_of("mixtral", num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=6)


def phi3(original_tokens: int, **changes: Any) -> Any:
    """8 dimensions of 16 a head are rotated; `original_tokens`: where the long factors begin."""
    rules = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.1, 1.3, 1.6],
        "long_factor": [1.0, 2.0, 5.0, 9.0],
    }
    return config_of(
        "phi3",
        hidden_size=64,
        num_attention_heads=4,
        rope_parameters=rules,
        original_max_position_embeddings=original_tokens,
        **changes,
    )


def gemma3_text(**changes: Any) -> Any:
    return config_of(
        "gemma3_text",
        head_dim=20,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=LOCAL_AND_GLOBAL,
        query_pre_attn_scalar=13,
        **changes,
    )


def gemma3() -> Any:
    """With a vision tower, which is left where it is."""
    from transformers import Gemma3Config

    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return Gemma3Config(text_config=gemma3_text().to_dict(), vision_config=vision)


@dataclass(frozen=True)
class Family:
    """A family under test: its configuration, and the context it is served with (0: its own)."""

    name: str
    config: Callable[[], Any]
    context_tokens: int = 0


FAMILIES = [
    Family("llama", llama),
    Family("smollm3", smollm3),
    Family("mistral", mistral),
    Family("mixtral", mixtral),
    Family("qwen2", qwen2),
    Family("qwen3", qwen3),
    Family("qwen3_moe", qwen3_moe),
    Family("gemma3_text", gemma3_text),
    Family("gemma3", gemma3),
    Family("phi3", lambda: phi3(4)),
]
VARIANTS = [
    Family("llama with biases", lambda: llama(attention_bias=True, mlp_bias=True)),
    Family("llama linear", llama_with("linear", factor=3.0)),
    Family("llama dynamic", llama_with("dynamic", factor=3.0)),
    Family("llama llama3", lambda: llama(rope_parameters=LLAMA3)),
    Family("llama yarn", lambda: llama(rope_parameters=YARN)),
    Family("llama yarn in full", lambda: llama(rope_parameters=YARN | YARN_RARE)),
    Family("qwen3 with biases", lambda: qwen3(attention_bias=True)),
    Family("smollm3 windows", lambda: smollm3(use_sliding_window=True, sliding_window=WINDOW)),
    Family("qwen3_moe not normalized", lambda: qwen3_moe(norm_topk_prob=False, mlp_only_layers=[])),
    Family("qwen3_moe every second", lambda: qwen3_moe(mlp_only_layers=[], decoder_sparse_step=2)),
    Family("phi3 short factors", lambda: phi3(256), 256),
    Family("phi3 window", lambda: phi3(4, sliding_window=WINDOW)),
]


def write_model(folder: Path, config: Any) -> Any:
    """A random model of `config`, saved to `folder` with a tokenizer; transformers' model."""
    from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration

    torch.manual_seed(11)
    with_eyes = config.model_type == "gemma3"
    build = Gemma3ForConditionalGeneration if with_eyes else AutoModelForCausalLM.from_config
    model = build(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # larger than default: errors show
            if "norm" in name and config.model_type.startswith("gemma"):
                # they count from one; what layers add has to outweigh the scaled embedding
                parameter.uniform_(-0.5, 0.5).add_(4.0 if "post_" in name else 0.0)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.3 if parameter.ndim == 1 else 0.15)
    model.save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return model


@dataclass(frozen=True)
class Case:
    """One family's model here and there, and what transformers says to some prompts."""

    folder: Path
    loaded: LoadedModel
    model: Any
    prompts: list[list[int]]
    outputs: list[list[int]]

    def jobs(self, prefix: str = "p") -> list[Any]:
        return [
            make_job(f"{prefix}{i}", prompt, max_tokens=NEW_TOKENS)
            for i, prompt in enumerate(self.prompts)
        ]

    def assert_equal(self, out: Output, prefix: str = "p") -> None:
        for i, expected in enumerate(self.outputs):
            assert out.tokens[f"{prefix}{i}"] == expected, f"prompt {i}"
            assert out.finishes[f"{prefix}{i}"].reason is FinishReason.LENGTH


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("family")
    model = write_model(folder, request.param.config())
    loaded = load_model(folder, "test", "float32", context_tokens=request.param.context_tokens)
    prompts = [random_tokens(n, seed, VOCAB) for seed, n in enumerate(PROMPT_LENGTHS)]
    drafts = finish_all(
        make_engine(loaded),
        [make_job(str(i), p, max_tokens=NEW_TOKENS) for i, p in enumerate(prompts)],
    ).tokens
    outputs = [greedy(model, p, drafts[str(i)]) for i, p in enumerate(prompts)]
    return Case(folder, loaded, model, prompts, outputs)


def assert_same_logits(loaded: LoadedModel, model: Any, prompt: list[int]) -> None:
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(logits_of(loaded, prompt), expected, rtol=1e-4, atol=1e-4)


def test_every_family_is_here() -> None:
    """A family without a test is a family that nobody knows the answers of."""
    assert set(ARCHITECTURES) <= {family.name for family in FAMILIES}


def test_logits_equal_the_reference(case: Case) -> None:
    """Every row of the longest prompt."""
    assert_same_logits(case.loaded, case.model, case.prompts[-1])


def test_the_outputs_tell_models_apart(case: Case) -> None:
    """Not one token over and over, and not the same to every prompt."""
    assert len({token for output in case.outputs for token in output}) > 10
    assert len({tuple(output) for output in case.outputs}) == len(case.outputs)


@pytest.mark.usefixtures("torch_alone")
def test_the_memory_check_counts_what_loading_measures(case: Case) -> None:
    """All but biases and the norms of queries and keys, which weigh nothing in a real model.

    With torch alone: the kernels pad rows and columns, which weighs nothing there either.
    """
    loaded = load_model(case.folder, "test", "float32")
    counted = memory.weight_bytes(loaded.config, "float32", "none")
    assert 0.98 * loaded.weight_bytes < counted <= loaded.weight_bytes


def test_alone(case: Case) -> None:
    """One prompt at a time: prefill in one piece, then decode."""
    out = Output()
    for job in case.jobs():
        single = finish_all(make_engine(case.loaded), [job])
        out.tokens |= single.tokens
        out.finishes |= single.finishes
    case.assert_equal(out)


def test_a_batch_of_mixed_lengths_cold_and_warm(case: Case) -> None:
    """All at once; the second round finds its prompts in the cache."""
    engine = make_engine(case.loaded)
    case.assert_equal(finish_all(engine, case.jobs("cold")), "cold")
    warm = finish_all(engine, case.jobs("warm"))
    case.assert_equal(warm, "warm")
    for i, prompt in enumerate(case.prompts):
        assert warm.cached[f"warm{i}"] == (len(prompt) - 1) // 16 * 16


def test_chunked(case: Case) -> None:
    """No step computes more than 13 tokens, so prompts arrive in pieces that fit no block."""
    engine = make_engine(case.loaded, max_running=5, step_tokens_max=13)
    out = finish_all(engine, case.jobs())
    case.assert_equal(out)
    assert len(out.stories["p4"].chunks) >= 7


def test_preempted_and_resumed(case: Case) -> None:
    """The pool holds the longest sequence and little else, so sequences keep giving way."""
    engine = make_engine(case.loaded, max(PROMPT_LENGTHS) + NEW_TOKENS + 48)
    out = finish_all(engine, case.jobs())
    case.assert_equal(out)
    assert sum(story.preemptions for story in out.stories.values()) > 0


def test_speculated(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses that come true, and some that part from the text in the middle: the same text."""
    texts = [p + o for p, o in zip(case.prompts, case.outputs, strict=True)]
    monkeypatch.setattr(Guesser, "guess", guesses_from(texts))
    out = finish_all(make_engine(case.loaded), case.jobs())
    case.assert_equal(out)
    guessed = sum(story.guessed for story in out.stories.values())
    right = sum(story.guessed_right for story in out.stories.values())
    assert 0.3 * guessed < right < guessed


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_variants_give_the_reference_logits(tmp_path: Path, variant: Family) -> None:
    """Biases, rotary scalings, windows, layers with and without experts."""
    model = write_model(tmp_path, variant.config())
    loaded = load_model(tmp_path, "m", "float32", context_tokens=variant.context_tokens)
    assert_same_logits(loaded, model, random_tokens(max(PROMPT_LENGTHS), 3, VOCAB))


@pytest.mark.parametrize("build", [gemma3_text, qwen3_moe, lambda: phi3(4)])
def test_bfloat16_is_near_the_reference_in_bfloat16(
    tmp_path: Path, build: Callable[[], Any]
) -> None:
    """As far from the exact logits as the reference is: nothing rounds where it does not."""
    model = write_model(tmp_path, build())
    loaded = load_model(tmp_path, "m", "bfloat16")
    prompt = random_tokens(max(PROMPT_LENGTHS), 3, VOCAB)
    with torch.inference_mode():
        exact = model(torch.tensor([prompt])).logits[0]
        theirs = model.to(torch.bfloat16)(torch.tensor([prompt])).logits[0].float()
    ours = logits_of(loaded, prompt)
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


def test_gemma_rounds_where_the_reference_rounds(tmp_path: Path) -> None:
    """Bit for bit in bfloat16: weights that count from one, and the scale of the embedding."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    model = write_model(tmp_path, gemma3_text()).to(torch.bfloat16)
    tokens = torch.arange(VOCAB)
    loaded = load_model(tmp_path, "m", "bfloat16").model
    assert loaded.embedding_scale is not None
    ours = loaded.embedding(tokens) * loaded.embedding_scale
    assert torch.equal(ours, model.model.embed_tokens(tokens))
    theirs = Gemma3RMSNorm(48).to(torch.bfloat16)
    with torch.no_grad():
        theirs.weight.uniform_(-0.1, 0.1)
        assert torch.equal(norms.shifted(theirs.weight, theirs.eps)(ours), theirs(ours))


def older(facts: dict[str, Any]) -> dict[str, Any]:
    """config.json as it was written before `rope_parameters` and `layer_types`."""
    facts = dict(facts)
    if "text_config" in facts:
        return facts | {"text_config": older(facts["text_config"])}
    rules = dict(facts.pop("rope_parameters"))
    if facts["model_type"] == "gemma3_text":
        facts["rope_local_base_freq"] = rules["sliding_attention"]["rope_theta"]
        rules = dict(rules["full_attention"])
    facts["rope_theta"] = rules.pop("rope_theta")
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if key in rules and facts["model_type"] == "phi3":
            facts[key] = rules.pop(key)
    rules["type"] = rules.pop("rope_type")
    facts["rope_scaling"] = None if rules == {"type": "default"} else rules
    if facts["model_type"] in ("qwen2", "qwen3", "smollm3"):
        del facts["layer_types"]
    return facts


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS], ids=lambda family: family.name)
def test_both_spellings_say_the_same(family: Family) -> None:
    """`rope_parameters` in newer files, keys at the top of config.json in older ones."""
    facts = json.loads(family.config().to_json_string(use_diff=False))
    assert read_config(older(facts)) == read_config(facts)


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_what_a_file_leaves_out_is_as_transformers_has_it(kind: str) -> None:
    """Without any one key of the family's defaults: the same model, or a refusal that names it."""
    from transformers import AutoConfig

    whole = json.loads(AutoConfig.for_model(kind).to_json_string(use_diff=False))
    optional = 0
    for key in whole.keys() - {"model_type"}:
        rest = {name: value for name, value in whole.items() if name != key}
        try:
            config = read_config(rest)
        except ModelError as error:
            assert key.removeprefix("num_local_") in str(error), str(error)
        else:
            assert config == read_config(whole), key
            optional += 1
    assert optional > 5


def test_gemma_files_leave_most_of_it_out() -> None:
    """google/gemma-3-4b-it's text_config in full; transformers knows the rest."""
    from transformers import Gemma3Config

    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = read_config({"model_type": "gemma3", "text_config": text}).model
    theirs = Gemma3Config(text_config=dict(text)).text_config
    whole = read_config({"model_type": "gemma3", "text_config": theirs.to_dict()}).model
    assert config == whole
    assert (config.heads, config.kv_heads, config.head_dim) == (8, 4, 256)
    assert config.tied and config.vocab_size == 262_208 and config.context_tokens == 131_072
    assert [config.windows[i] for i in (0, 4, 5, 6, 11)] == [1024, 1024, 0, 1024, 0]


def test_the_served_context_chooses_the_rotary_factors(tmp_path: Path) -> None:
    """Up to the original context the short factors, above it the long ones, as vLLM has it."""
    write_model(tmp_path, phi3(128))
    prompt = random_tokens(60, 3, VOCAB)
    by_context = {
        context: logits_of(load_model(tmp_path, "m", "float32", context_tokens=context), prompt)
        for context in (64, 128, 129, 0)
    }
    assert torch.equal(by_context[64], by_context[128])
    assert torch.equal(by_context[129], by_context[0])
    assert not torch.allclose(by_context[128], by_context[129], atol=1e-2)
    short = load_model(tmp_path, "m", "float32", context_tokens=128).record
    assert short.context_tokens == 128
    # their keys are rotated differently, so their KV must not be exchanged
    assert short.fingerprint != load_model(tmp_path, "m", "float32").record.fingerprint
    for context in (513, -1):
        with pytest.raises(ModelError, match=f"a context of {context} tokens is"):
            load_model(tmp_path, "m", "float32", context_tokens=context)


def test_yarn_lengthens_the_context_that_config_json_declares() -> None:
    """Who adds YaRN to a config.json leaves max_position_embeddings as it was, as Qwen advises."""
    facts = json.loads(
        qwen3(rope_parameters=YARN | {"original_max_position_embeddings": 512}).to_json_string()
    )
    assert read_config(facts).model.context_tokens == 2048


@pytest.fixture(scope="module")
def facts() -> dict[str, dict[str, Any]]:
    """config.json by family."""
    return {f.name: json.loads(f.config().to_json_string(use_diff=False)) for f in FAMILIES}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "rwkv"}, "'rwkv' is not supported; supported: gemma3_text, llama"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"hidden_activation": "relu"}, "hidden_activation = 'relu' is not"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "has no full_attention"),
        ("gemma3", {"text_config": None}, "a gemma3 model needs text_config"),
        ("gemma3", {"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            "llama",
            {"hidden_act": "relu2"},
            "hidden_act = 'relu2' is not supported; supported: silu",
        ),
        ("llama", {"sliding_window": 64}, "sliding_window = 64"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "mrope"}},
            "rope type 'mrope' is not supported",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear"}},
            "factor is None, expected a number",
        ),
        (
            "llama",
            {"rope_parameters": LOCAL_AND_GLOBAL},
            "sliding_attention, full_attention is not",
        ),
        ("llama", {"rope_scaling": "linear"}, "rope scaling is 'linear', expected an object"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0, expected at least 1"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types .* for mistral"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types chunked_attention are"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "there is no sliding_window"),
        ("qwen3", {"layer_types": ["full_attention"]}, "does not name 3 layers"),
        ("smollm3", {"no_rope_layers": [1]}, "does not name 3 layers"),
        ("mixtral", {"num_experts_per_tok": 9}, "a token cannot go to 9 of 4 experts"),
        ("phi3", {"rope_parameters": {"rope_type": "su"}}, "short_factor is None, expected a list"),
    ],
)
def test_what_would_be_another_model_is_refused_by_name(
    facts: dict[str, dict[str, Any]], family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read_config(facts[family] | changes)


def test_long_factors_have_to_fit_the_heads(facts: dict[str, dict[str, Any]]) -> None:
    rules = facts["phi3"]["rope_parameters"] | {"long_factor": [1.0, 2.0]}
    with pytest.raises(ModelError, match="2 long rotary factors for 4 frequencies"):
        read_config(facts["phi3"] | {"rope_parameters": rules})


def test_pickled_weights_and_other_tokenizers_are_refused(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """The message says what lies there, why it is not read, and what to do."""
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    with pytest.raises(ModelError, match=r"its tokenizer as tokenizer\.model only.*transformers"):
        load_model(tmp_path, "m")
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        load_model(tmp_path, "m")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle \(pytorch_model\.bin\), which runs code"):
        load_model(tmp_path, "m")


def test_progress_is_told_in_bytes(tiny_folder: Path) -> None:
    """It rises with every tensor and ends at the size of all of them."""
    told: list[tuple[int, int]] = []
    load_model(tiny_folder, "m", "float32", progress=lambda done, of: told.append((done, of)))
    done = [so_far for so_far, _ in told]
    assert done == sorted(set(done)) and len(done) == 30
    assert {total for _, total in told} == {done[-1]}
    file_bytes = (tiny_folder / "model.safetensors").stat().st_size
    assert 0.9 * file_bytes < done[-1] < file_bytes


@pytest.mark.parametrize(
    ("free_mib", "advice"),
    [
        (24_000, r"it would fit as bfloat16 \(.*HEADRACE_DTYPE=bfloat16\) or int8 \(.*int4 \("),
        (12_000, r"it would fit as int8 \(.*HEADRACE_QUANTIZATION=int8\) or int4 \("),
        (9_500, r"it would fit as int4 \("),
        (2_000, r"it would not fit as bfloat16 \(.*int8 \(.*int4 \(.* either: use a smaller model"),
    ],
)
def test_a_model_that_does_not_fit_is_told_what_would(
    monkeypatch: pytest.MonkeyPatch, free_mib: int, advice: str
) -> None:
    """Llama 3.1 8B in float32, over what a machine may have free."""
    config = read_config(
        json.loads(
            llama(
                vocab_size=128_256,
                hidden_size=4096,
                intermediate_size=14_336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
            ).to_json_string()
        )
        | {"head_dim": 128}
    ).model
    assert config.parameters == 8_030_261_248
    monkeypatch.setattr(memory, "available_bytes", lambda: free_mib << 20)
    needs = rf"8,030M parameters in float32 needs .* MiB of memory, {free_mib:,} MiB are available"
    with pytest.raises(ModelError, match=f"{needs}: {advice}"):
        memory.require_model(config, config.vocab_size * config.hidden_size, "float32", "none")
