"""`headrace plan`: how to lay a model over devices, what fits, and what it could do at most.

The model's configuration is read by a process with the worker's packages: this one must not import
torch. The rest is arithmetic (`policy/topology.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from headrace.cli.common import CommandError, plain_errors

if TYPE_CHECKING:
    from rich.console import Console

    from headrace.policy.devices import Fleet
    from headrace.policy.model_shape import ModelShape
    from headrace.policy.topology import Split, Topology

READ_TIMEOUT_S = 120
PIPE_COLUMNS = 140

Model = Annotated[
    str,
    typer.Option(
        envvar="HEADRACE_MODEL",
        help="Alias, Hugging Face id that is here, GGUF file, folder or config.json: no weights "
        "are read.",
    ),
]
Gpus = Annotated[
    str | None,
    typer.Option(help="GPUs as 8x80G, 8xh100, 8xa100-40G, or in hosts: 2x8xh100."),
]
Cpu = Annotated[str | None, typer.Option(help="Machines without a GPU, as 2x24G.")]
Dtype = Annotated[
    Literal["bfloat16", "float32"],
    typer.Option(envvar="HEADRACE_DTYPE", help="What the model computes in."),
]
Quantization = Annotated[
    Literal["none", "int8", "int4"],
    typer.Option(envvar="HEADRACE_QUANTIZATION", help="Bits of the weights."),
]
KvDtype = Annotated[
    Literal["auto", "int8"], typer.Option(envvar="HEADRACE_KV_DTYPE", help="The KV cache.")
]
Context = Annotated[
    int, typer.Option(min=0, help="The longest request to serve; 0: whatever fits.")
]
Streams = Annotated[int, typer.Option(min=1, help="Jobs at a time in each replica.")]
Held = Annotated[int, typer.Option(min=1, help="Tokens that a job holds on average.")]
StepTokens = Annotated[int, typer.Option(min=16, help="Token budget of one engine step.")]
Tensor = Annotated[
    int, typer.Option("--tensor-parallel", min=0, help="This many, and no other; 0: any.")
]
Pipeline = Annotated[
    int, typer.Option("--pipeline-parallel", min=0, help="This many, and no other; 0: any.")
]
Bandwidth = Annotated[float, typer.Option(min=0, help="A device's memory, in GB/s.")]
Tflops = Annotated[float, typer.Option(min=0, help="A device's bfloat16, dense, in Tflop/s.")]
Link = Annotated[float, typer.Option(min=0, help="A link between devices, one way, in GB/s.")]
All = Annotated[bool, typer.Option("--all", help="Show every split that is refused, and why.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@plain_errors
def plan(
    model: Model = "smollm2",
    gpus: Gpus = None,
    cpu: Cpu = None,
    dtype: Dtype = "bfloat16",
    quantization: Quantization = "none",
    kv_dtype: KvDtype = "auto",
    context: Context = 0,
    streams: Streams = 64,
    held_tokens: Held = 2_048,
    step_tokens: StepTokens = 2_048,
    tensor: Tensor = 0,
    pipeline: Pipeline = 0,
    bandwidth_gbs: Bandwidth = 0,
    tflops: Tflops = 0,
    link_gbs: Link = 0,
    everything: All = False,
    as_json: Json = False,
) -> None:
    """Say how a model fits devices: tensor x pipeline x replicas, KV tokens, limits, and why.

        headrace plan --model ./Llama-3.1-70B --gpus 8xh100

    May these 4 GPUs split it in 3?

        headrace plan --model ./Llama-3.1-70B --gpus 4x80G --tensor-parallel 3
    """
    from headrace.policy.devices import parse_cpu, parse_gpus, with_speeds
    from headrace.policy.model_shape import Precision
    from headrace.policy.topology import Wish
    from headrace.policy.topology import plan as plan_topology

    if (gpus is None) == (cpu is None):
        raise CommandError("say what there is: --gpus 8x80G, or --cpu 2x24G")
    fleet = parse_gpus(gpus) if gpus is not None else parse_cpu(cpu or "")
    fleet = with_speeds(fleet, bandwidth_gbs=bandwidth_gbs, tflops=tflops, link_gbs=link_gbs)
    how = Precision(dtype, quantization, kv_dtype)
    wish = Wish(context, streams, held_tokens, step_tokens, tensor, pipeline)
    shape = read_shape(model)
    topology = plan_topology(shape, how, fleet, wish)
    if as_json:
        print(json.dumps(_facts(shape, fleet, topology), indent=2))
    else:
        _print(model, shape, fleet, topology, everything=everything)
    if not topology.fitting:
        raise typer.Exit(1)


def read_shape(model: str) -> ModelShape:
    """The shape of `model`, read by a process of the worker's. Raises CommandError."""
    from headrace.policy.model_shape import ModelShape

    if find_spec("headrace_worker") is None or find_spec("torch") is None:
        raise CommandError("reading a model's configuration needs pip install 'headrace[worker]'")
    argv = [sys.executable, "-m", "headrace_worker.describe", model]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=READ_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise CommandError(
            f"reading {model} took more than {READ_TIMEOUT_S} s and was given up"
        ) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise CommandError(lines[-1] if lines else f"{model} cannot be read")
    return ModelShape.of_facts(json.loads(done.stdout))


# --- JSON


def _facts(shape: ModelShape, fleet: Fleet, topology: Topology) -> dict[str, Any]:
    return {
        "model": shape.facts()
        | {"parameters": shape.parameters, "active_parameters": shape.active_parameters},
        "fleet": asdict(fleet),
        "notes": list(topology.notes),
        "fitting": [_split_facts(split) for split in topology.fitting],
        "refused": [
            {"tensor": s.tensor, "pipeline": s.pipeline, "reason": s.refusal}
            for s in topology.refused
        ],
    }


def _split_facts(split: Split) -> dict[str, Any]:
    return {
        "tensor": split.tensor,
        "pipeline": split.pipeline,
        "replicas": split.replicas,
        "unused_devices": split.unused,
        "kv_tokens": split.kv_tokens,
        "score": split.score,
        "reasons": list(split.reasons),
        "bounds": [asdict(bound) for bound in split.bounds],
        "stages": [
            {
                "layers": [stage.layers.start, stage.layers.stop],
                "weights_bytes": stage.weights_bytes,
                "step_bytes": stage.step_bytes,
                "runtime_bytes": stage.runtime_bytes,
                "usable_bytes": stage.usable_bytes,
                "kv_bytes": stage.kv_bytes,
                "kv_token_bytes": stage.kv_token_bytes,
            }
            for stage in split.stages
        ],
    }


# --- a table


def _print(
    model: str, shape: ModelShape, fleet: Fleet, topology: Topology, *, everything: bool
) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False)
    active = ""
    if shape.experts:
        active = f", {shape.active_parameters / 1e9:,.2f}B of them for a token"
    name = Path(model).name or model
    console.print(
        f"{name}: {shape.architecture}, {shape.parameters / 1e9:,.2f}B parameters{active}; "
        f"{shape.layers} layers, {shape.heads} heads, {shape.kv_heads} KV heads of "
        f"{shape.head_dim}; on {fleet.count} x {fleet.device.name}"
    )
    for note in topology.notes:
        console.print(f"note: {note}")
    if topology.fitting:
        _print_fitting(console, topology.fitting)
        _print_best(console, topology.fitting[0])
    if everything or not topology.fitting:
        for split in topology.refused:
            console.print(f"TP{split.tensor} x PP{split.pipeline} refused: {split.refusal}")
    elif topology.refused:
        console.print(f"{len(topology.refused)} other splits are refused: --all says why")


def _print_fitting(console: Console, splits: tuple[Split, ...]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in ("TP", "PP", "replicas", "unused", "weights GiB", "KV tokens each", "in all"):
        table.add_column(column, justify="right")
    for bound in splits[0].bounds:
        table.add_column(f"{bound.name.split(',')[0]} {_short(bound.name)}", justify="right")
    for split in splits:
        heaviest = max(stage.weights_bytes for stage in split.stages)
        table.add_row(
            str(split.tensor),
            str(split.pipeline),
            str(split.replicas),
            str(split.unused),
            f"{heaviest / 2**30:,.1f}",
            f"{split.kv_tokens:,}",
            f"{split.kv_tokens * split.replicas:,}",
            *(f"{bound.tokens_per_s:,.0f}" for bound in split.bounds),
        )
    console.print(table)


def _short(name: str) -> str:
    return {"decode, one stream": "1 stream", "prefill": "tok/s"}.get(name, "all streams")


def _print_best(console: Console, best: Split) -> None:
    console.print(
        f"take TP{best.tensor} x PP{best.pipeline} x {best.replicas} replicas: the most tokens "
        "over all replicas, with the fewest devices in each"
    )
    for bound in best.bounds:
        console.print(
            f"  {bound.name}: at most {bound.tokens_per_s:,.0f} tokens/s a replica by {bound.by}: "
            f"{bound.arithmetic}"
        )
    tightest = min(best.stages, key=lambda stage: stage.kv_tokens)
    console.print(f"  memory of a device: {tightest.told()}")
    for reason in best.reasons:
        console.print(f"  {reason}")
