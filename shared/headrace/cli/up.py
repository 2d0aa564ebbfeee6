"""`headrace up`: the whole fleet on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from headrace.cli.common import DataDir, data_dir_of, parse_roles, parse_size, plain_errors

Host = Annotated[str, typer.Option(envvar="HEADRACE_HOST", help="Address to serve on.")]
Port = Annotated[
    int, typer.Option(envvar="HEADRACE_PORT", min=0, max=65535, help="0 takes a free one.")
]
Workers = Annotated[int, typer.Option(envvar="HEADRACE_WORKERS", min=1, max=64)]
Model = Annotated[
    str, typer.Option(envvar="HEADRACE_MODEL", help="Alias, Hugging Face id or path.")
]
ModelName = Annotated[
    str | None, typer.Option(envvar="HEADRACE_MODEL_NAME", help="Name that clients use.")
]
Dtype = Annotated[
    str | None, typer.Option(envvar="HEADRACE_DTYPE", help="What the model computes in.")
]
Quantization = Annotated[
    Literal["auto", "none", "int8", "int4"] | None,
    typer.Option(envvar="HEADRACE_QUANTIZATION", help="Bits of the weights, chosen at load."),
]
KvDtype = Annotated[
    Literal["auto", "int8"] | None,
    typer.Option(envvar="HEADRACE_KV_DTYPE", help="int8 halves the KV cache."),
]
Speculation = Annotated[
    Literal["ngram", "off"] | None,
    typer.Option(envvar="HEADRACE_SPECULATION", help="Guess tokens from the text so far."),
]
ContextTokens = Annotated[
    int | None,
    typer.Option(
        envvar="HEADRACE_CONTEXT_TOKENS", min=1, help="Longest sequence. Default: the model's own."
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        envvar="HEADRACE_TENSOR_PARALLEL", min=1, max=64, help="Processes that share each layer."
    ),
]
PipelineParallel = Annotated[
    int,
    typer.Option(
        envvar="HEADRACE_PIPELINE_PARALLEL", min=1, max=64, help="Stages that layers are spread on."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(envvar="HEADRACE_THREADS", min=1, help="Per worker. Default: cores / workers."),
]
Roles = Annotated[
    str | None,
    typer.Option(
        envvar="HEADRACE_ROLES",
        help="P:D: how many workers compute prompts and how many decode; others do both.",
    ),
]
RedisUrl = Annotated[
    str | None,
    typer.Option(envvar="HEADRACE_REDIS_URL", help="Default: an embedded Valkey of its own."),
]
ApiKeys = Annotated[
    str | None,
    typer.Option(envvar="HEADRACE_API_KEYS", help="Keys to accept. Default: nobody is asked."),
]
Otlp = Annotated[
    str | None,
    typer.Option(
        envvar="HEADRACE_OTLP_ENDPOINT", help="Where traces go, e.g. http://127.0.0.1:4318."
    ),
]
KvTokens = Annotated[
    int | None,
    typer.Option(envvar="HEADRACE_KV_TOKENS", min=1, help="Tokens of KV each worker can hold."),
]
MaxJobs = Annotated[
    int | None,
    typer.Option(envvar="HEADRACE_MAX_JOBS", min=1, help="Jobs at a time on each worker."),
]
CacheBytes = Annotated[
    str | None,
    typer.Option(envvar="HEADRACE_CACHE_BYTES", help="Memory of the cache service, e.g. 512M."),
]
CacheDiskPath = Annotated[
    Path | None,
    typer.Option(
        envvar="HEADRACE_CACHE_DISK_PATH",
        file_okay=False,
        help="Folder in which the cache survives a restart. Default: nothing is on disk.",
    ),
]
CacheDiskBytes = Annotated[
    str | None,
    typer.Option(envvar="HEADRACE_CACHE_DISK_BYTES", help="What its files take, e.g. 20G."),
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", envvar="HEADRACE_NO_CACHE", help="No cache service.")
]


@plain_errors
def up(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    workers: Workers = 1,
    roles: Roles = None,
    model: Model = "smollm2",
    model_name: ModelName = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    kv_dtype: KvDtype = None,
    speculation: Speculation = None,
    context_tokens: ContextTokens = None,
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
    threads: Threads = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    api_keys: ApiKeys = None,
    otlp_endpoint: Otlp = None,
    kv_tokens: KvTokens = None,
    max_jobs: MaxJobs = None,
    cache_bytes: CacheBytes = None,
    cache_disk_path: CacheDiskPath = None,
    cache_disk_bytes: CacheDiskBytes = None,
    no_cache: NoCache = False,
) -> None:
    """Start the whole fleet on this machine and keep it up until Ctrl-C."""
    from headrace.cli.stack import UpOptions, run

    split = parse_roles(roles) if roles else (0, 0)
    run(
        UpOptions(
            host=host,
            port=port,
            workers=max(workers, sum(split)),
            roles=split,
            model=model,
            model_name=model_name or "",
            dtype=dtype or "",
            quantization=quantization or "",
            kv_dtype=kv_dtype or "",
            speculation=speculation or "",
            context_tokens=context_tokens,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            threads=threads,
            data_dir=data_dir_of(data_dir),
            redis_url=redis_url or "",
            api_keys=api_keys or "",
            otlp_endpoint=otlp_endpoint or "",
            kv_tokens=kv_tokens,
            max_jobs=max_jobs,
            cache_bytes=parse_size(cache_bytes) if cache_bytes else None,
            cache_disk_path=cache_disk_path.absolute() if cache_disk_path else None,
            cache_disk_bytes=parse_size(cache_disk_bytes) if cache_disk_bytes else None,
            no_cache=no_cache,
        )
    )
