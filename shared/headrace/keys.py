"""Every key Headrace has in Redis, with its lifetime and its writer.

Keys of one model share the hash tag `{model}`, so that each Lua script stays on one Cluster slot.

| key | kind | writer | lives |
|---|---|---|---|
| `headrace:models` | hash name → fingerprint | workers | for ever (one small field a model) |
| `headrace:gateway:<id>` | msgpack | that gateway | `GATEWAY_LEASE_MS`, renewed |
| `headrace:{m}:record` | msgpack ModelRecord | workers | for ever, overwritten |
| `headrace:{m}:intake` | stream | gateways | an entry until its job is handed off or cancelled |
| `headrace:{m}:job:<id>` | hash | the Lua scripts | `JOB_TTL_MS`; `JOB_LINGER_MS` once finished |
| `headrace:{m}:jobs:<worker>` | stream | dispatcher | an entry until its job ends or moves on |
| `headrace:{m}:lease:<worker>` | string | that worker | its lease, renewed by heartbeats |
| `headrace:{m}:workers` | hash of WorkerRecord | that worker | until it leaves or is reaped |
| `headrace:{m}:load:<worker>` | hash | the Lua scripts | until it leaves or is reaped |
| `headrace:{m}:status:<worker>` | msgpack | that worker | its lease, renewed by heartbeats |
| `headrace:{m}:replies:<gateway>` | stream | workers, dispatcher | `REPLIES_TTL_MS`, renewed |
| `headrace:{m}:leader` | string | gateways | `LEADER_LEASE_MS`, renewed by the dispatcher |
| `headrace:{m}:board` | msgpack Board | dispatcher | `BOARD_TTL_MS`, renewed |
| `headrace:{m}:service` | hash tenant → virtual counter | dispatcher | `SERVICE_TTL_MS`, renewed |
| `headrace:{m}:blocks:<worker>` | msgpack BlockSnapshot | that worker | `BLOCKS_TTL_MS`, renewed |
| `headrace:{m}:places:<gateway>` | msgpack Positions | dispatcher | `PLACES_TTL_MS`, renewed |
| `headrace:{m}:flight:<key>` | hash | gateways | `FLIGHT_LEASE_MS`, renewed by who reads |
| `headrace:limit:{<key>}:…` | see `limits.py` | gateways | until its window is over |
| `headrace:{m}:events` | stream | the Lua scripts, workers | about `EVENTS_MAX` entries (hints) |
| `headrace:{:cache}:nodes` | set of addresses | cache services | for ever; one drops the dead |
| `headrace:{:cache}:node:<a>` | msgpack CacheNode | that service | `NODE_LEASE_MS`, renewed |
| `headrace:{:cache}:events:<t>` | stream of BlockNews | cache services | about `CACHE_EVENTS_MAX` |
| `headrace:{:cache}:blocks:<t>:<a>` | BlockNews, all | that service | `BLOCKS_TTL_MS`, renewed |

`<a>` is a cache service's address, `<t>` a model's tag (`policy/hashing.py`) in hex. No model's
name begins with a colon, so `{:cache}` is nobody else's.
"""

from __future__ import annotations

import re

from headrace.errors import CallerError

MODELS = "headrace:models"

GATEWAY_LEASE_MS = 5_000
LEADER_LEASE_MS = 2_000
BOARD_TTL_MS = 3_000
JOB_TTL_MS = 24 * 3_600_000
JOB_LINGER_MS = 60_000
REPLIES_TTL_MS = 3_600_000
EVENTS_MAX = 10_000
SERVICE_TTL_MS = 24 * 3_600_000
BLOCKS_TTL_MS = 60_000
PLACES_TTL_MS = 3_000
NODE_LEASE_MS = 3_000
FLIGHT_LEASE_MS = 5_000
CACHE_EVENTS_MAX = 1_000
CACHE_NODES = "headrace:{:cache}:nodes"

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,199}")


def check_model_name(name: str) -> str:
    """The name itself, if it can stand in a key. Raises CallerError otherwise."""
    if not _MODEL_NAME.fullmatch(name):
        raise CallerError(
            f"model name {name[:80]!r} is not valid: letters, digits and . _ / : - only, "
            "200 characters at most",
            param="model",
            code="invalid_model_name",
        )
    return name


def gateway(gateway_id: str) -> str:
    return f"headrace:gateway:{gateway_id}"


def record(model: str) -> str:
    return f"headrace:{{{model}}}:record"


def intake(model: str) -> str:
    return f"headrace:{{{model}}}:intake"


def job(model: str, job_id: str) -> str:
    return f"headrace:{{{model}}}:job:{job_id}"


def jobs(model: str, worker: str) -> str:
    return f"headrace:{{{model}}}:jobs:{worker}"


def lease(model: str, worker: str) -> str:
    return f"headrace:{{{model}}}:lease:{worker}"


def workers(model: str) -> str:
    return f"headrace:{{{model}}}:workers"


def load(model: str, worker: str) -> str:
    return f"headrace:{{{model}}}:load:{worker}"


def status(model: str, worker: str) -> str:
    return f"headrace:{{{model}}}:status:{worker}"


def replies(model: str, gateway_id: str) -> str:
    return f"headrace:{{{model}}}:replies:{gateway_id}"


def leader(model: str) -> str:
    return f"headrace:{{{model}}}:leader"


def board(model: str) -> str:
    return f"headrace:{{{model}}}:board"


def events(model: str) -> str:
    return f"headrace:{{{model}}}:events"


def service(model: str) -> str:
    return f"headrace:{{{model}}}:service"


def blocks(model: str, worker: str) -> str:
    return f"headrace:{{{model}}}:blocks:{worker}"


def places(model: str, gateway_id: str) -> str:
    return f"headrace:{{{model}}}:places:{gateway_id}"


def flight(model: str, key: bytes) -> str:
    return f"headrace:{{{model}}}:flight:{key.hex()}"


def limit_used(key_id: str) -> str:
    return f"headrace:limit:{{{key_id}}}:used"


def limit_running(key_id: str) -> str:
    return f"headrace:limit:{{{key_id}}}:running"


def cache_node(address: str) -> str:
    return f"headrace:{{:cache}}:node:{address}"


def cache_events(tag: bytes) -> str:
    return f"headrace:{{:cache}}:events:{tag.hex()}"


def cache_blocks(tag: bytes, address: str) -> str:
    return f"headrace:{{:cache}}:blocks:{tag.hex()}:{address}"
