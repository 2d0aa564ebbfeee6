"""GET /v1/models and GET /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from headrace.types import ModelRecord
from headrace_gateway.api.context import GATEWAY


def model_json(record: ModelRecord, created_s: int) -> dict[str, Any]:
    """OpenAI's fields, and `max_model_len` and `root` as vLLM's clients read them."""
    return {
        "id": record.name,
        "object": "model",
        "created": created_s,
        "owned_by": "headrace",
        "root": record.fingerprint,
        "max_model_len": record.context_tokens,
    }


def _created_s(request: web.Request) -> int:
    # when a model was made is not known; when this gateway began to offer it, is
    gateway = request.app[GATEWAY]
    up_ms = gateway.clock.now_ms() - gateway.started_ms
    return (gateway.clock.wall_ms() - up_ms) // 1000


async def list_models(request: web.Request) -> web.Response:
    """Every model that the fleet knows."""
    created_s = _created_s(request)
    records = sorted(request.app[GATEWAY].fleet.models(), key=lambda record: record.name)
    data = [model_json(record, created_s) for record in records]
    return web.json_response({"object": "list", "data": data})


async def get_model(request: web.Request) -> web.Response:
    """One model. Raises NotFoundError."""
    record = request.app[GATEWAY].fleet.model(request.match_info["id"])
    return web.json_response(model_json(record, _created_s(request)))
