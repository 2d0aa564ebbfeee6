"""What the worker's tests share: a tiny random model, SmolLM2 with its reference, the kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace_worker import native
from headrace_worker.loading import LoadedModel, load_model
from headrace_worker.native.abi import Library
from worker.builders import finish_all, make_engine, make_job, split_as_named, write_hf_folder
from worker.prompts import PROMPTS

NEW_TOKENS = 24


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on a busy two-core machine wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def torch_alone() -> Iterator[None]:
    """Models loaded and engines made in this test compute without the kernels."""
    native.choose("off")
    yield
    native.choose("auto")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_hf_folder(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedModel:
    return load_model(tiny_folder, "test", "float32")


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> LoadedModel:
    return load_model(smollm2_path, "test", "float32")


@dataclass(frozen=True)
class Reference:
    """transformers on the same weights: its model, its tokenizer, its greedy continuations."""

    model: Any
    tokenizer: Any
    prompts: list[list[int]]
    outputs: list[list[int]]


@pytest.fixture(scope="session")
def hf_tokenizer(smollm2_path: Path) -> Any:
    from transformers import AutoTokenizer

    return split_as_named(
        AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name), "smollm"
    )


@pytest.fixture(scope="session")
def reference(smollm2: LoadedModel, smollm2_path: Path, hf_tokenizer: Any) -> Reference:
    import transformers.modeling_utils
    from transformers import AutoModelForCausalLM, GgufConfig

    transformers.utils.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        # the loader asks for accelerate, whose device placement a plain CPU load does not use
        patch.setattr(transformers.modeling_utils, "is_accelerate_available", lambda *_: True)
        model = AutoModelForCausalLM.from_pretrained(
            smollm2_path.parent,
            gguf_file=smollm2_path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        ).eval()
    prompts = [hf_tokenizer.encode(text) for text in PROMPTS]
    drafts = finish_all(
        make_engine(smollm2),
        [make_job(str(i), p, max_tokens=NEW_TOKENS) for i, p in enumerate(prompts)],
    ).tokens
    outputs = [greedy(model, p, drafts[str(i)]) for i, p in enumerate(prompts)]
    return Reference(model, hf_tokenizer, prompts, outputs)


def greedy(model: Any, prompt: list[int], draft: list[int]) -> list[int]:
    """The model's own greedy continuation, NEW_TOKENS long, end tokens included.

    Each forward pass checks all of `draft` at once, keeps what the model would have said and
    takes the model's word where they part: whatever the draft, the result is the model's.
    """
    tokens: list[int] = []
    while len(tokens) < NEW_TOKENS:
        guess = draft if draft[: len(tokens)] == tokens else tokens
        with torch.inference_mode():
            logits = model(
                torch.tensor([prompt + guess]), logits_to_keep=len(guess) - len(tokens) + 1
            ).logits[0]
        said = logits.argmax(-1).tolist()
        ahead = [*guess[len(tokens) :], None]
        for theirs, ours in zip(said, ahead, strict=True):
            tokens.append(theirs)
            if theirs != ours:
                break
    return tokens[:NEW_TOKENS]


@pytest.fixture(scope="module")
def library() -> Library:
    found = native.library()
    if found is None:
        pytest.skip(f"no kernels: {native.state()}")
    return found


@pytest.fixture(params=["avx2", "avx512"])
def each_isa(request: pytest.FixtureRequest, library: Library) -> Iterator[str]:
    """Every instruction set that this processor has."""
    best = library.isa
    if request.param == "avx512" and "HEADRACE_TEST_AVX512" not in os.environ:
        pytest.skip("they have not run on such a processor yet: HEADRACE_TEST_AVX512=1 tries them")
    if library.use(request.param) != request.param:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.use(best)
