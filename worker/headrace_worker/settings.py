"""The worker's settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from headrace.config import ServiceSettings
from headrace.types import WorkerRole
from headrace_worker.policy.pace import STRETCH
from headrace_worker.policy.scheduler import CALM_MS


class WorkerSettings(ServiceSettings):
    """Read from `HEADRACE_…` variables; `headrace up` sets them from its flags."""

    model: str = Field(default="smollm2", description="alias, Hugging Face repo id or path")
    model_name: str = Field(default="", description="name clients use; empty: the alias")
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = Field(
        default="auto", description="cpu, cuda or cuda:N; auto: a GPU where there is one"
    )
    attention: Literal["auto", "sdpa", "flash"] = Field(
        default="auto", description="sdpa: torch; flash: flash-attn, on GPUs; auto: what works"
    )
    quantization: Literal["auto", "none", "int8", "int4"] = Field(
        default="auto",
        description="auto: int8 where the native kernels multiply it and dtype is auto (int4 for "
        "a model file that is in 4 bits itself), else none",
    )
    kv_dtype: Literal["auto", "int8"] = Field(
        default="auto", description="int8 halves the KV cache; auto: as the model computes"
    )
    context_tokens: int = Field(
        default=0, ge=0, description="longest context to serve; 0: all that the model was made for"
    )
    kernels: Literal["auto", "avx512", "off"] = Field(
        default="auto",
        description="native CPU kernels, built on first use, for AVX2; avx512: those for AVX-512, "
        "which have not run on such a processor yet; off: torch alone",
    )
    speculation: Literal["ngram", "off"] = "ngram"
    threads: int = Field(default=0, ge=0, le=1024, description="0: as many as torch chooses")
    nice: int = Field(
        default=5,
        ge=0,
        le=19,
        description="how far computing steps back for gateways and Redis on the same cores; 0: not",
    )
    tensor_parallel: int = Field(
        default=1, ge=1, le=64, description="ranks that share each layer of the model"
    )
    pipeline_parallel: int = Field(
        default=1, ge=1, le=64, description="stages that hold the model's layers one after another"
    )
    rank_links: Literal["auto", "shared", "torch"] = Field(
        default="auto",
        description="how ranks of one host reach each other: in shared memory, on x86 CPUs, or "
        "through torch.distributed, as on several hosts and between GPUs; auto: what fits",
    )
    kv_tokens: int = Field(
        default=0, ge=0, description="size of the KV pool in tokens; 0: from free memory"
    )
    max_jobs: int = Field(default=32, ge=1, le=4096, description="jobs that run at once")
    step_tokens: int = Field(
        default=512, ge=16, le=65_536, description="token budget of one engine step"
    )
    lower_prefill_ms: int = Field(
        default=100,
        ge=1,
        description="what prompts of lower bands may take of a step while a better band is about",
    )
    step_stretch: float = Field(
        default=STRETCH,
        ge=0,
        le=1_000,
        description="how many times as long as without prompts a step of streams may take; 0: any",
    )
    calm_ms: int = Field(
        default=CALM_MS,
        ge=0,
        description="for how long after it last ran a band counts as being about",
    )
    worker_id: str = Field(default="", max_length=100, pattern=r"^[A-Za-z0-9._-]*$")
    lease_ms: int = Field(default=3_000, ge=300, le=600_000)
    stall_ms: int = Field(
        default=60_000,
        ge=1_000,
        description="an engine step that takes longer counts as hung: the lease is let go",
    )
    drain_ms: int = Field(
        default=8_000, ge=0, description="how long SIGTERM waits for running jobs"
    )
    role: WorkerRole = Field(
        default=WorkerRole.BOTH,
        description="prefill: computes prompts and hands jobs on; decode: goes on with them; "
        "both: neither",
    )
    kv_listen: str = Field(
        default="tcp://127.0.0.1:0",
        description="where a prefill or decode worker takes KV: tcp://host:port that the others "
        "reach, or unix:///path",
    )
    cache_url: str = Field(
        default="",
        description="tcp://host:port or unix:///path, several with commas, or `auto` for those "
        "that Redis knows; empty: none",
    )
    cache_timeout_ms: int = Field(default=500, ge=1)
    metrics_port: int = Field(default=0, ge=0, le=65_535, description="0: no metrics listener")
    step_log: str = Field(
        default="",
        description="a folder in which a file gets a line for each engine step, for `headrace "
        "bench calibrate`; empty: none",
    )
