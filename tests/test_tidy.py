"""The rules of the house that a machine can check: imports, purity of policies, sizes.

Written with the standard library's `ast`, so that nothing has to be importable to be checked.
"""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "headrace": ROOT / "shared" / "headrace",
    "headrace_gateway": ROOT / "gateway" / "headrace_gateway",
    "headrace_worker": ROOT / "worker" / "headrace_worker",
    "headrace_cache": ROOT / "cache-service" / "headrace_cache",
    "headrace_sim": ROOT / "shared" / "headrace_sim",
}
LAZILY = {"headrace": "headrace_sim"}
"""A package's one exception: the command line starts the simulator, which imports the policies."""
FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 500
IMPURE = {
    "asyncio", "redis", "torch", "aiohttp", "time", "datetime", "random", "secrets", "logging",
    "structlog", "os", "socket", "threading", "opentelemetry", "subprocess",
}  # fmt: skip


def sources(package: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGES[package].rglob("*.py")):
        # Python 3.11 raises SystemError where a collection runs finalizers while it builds a tree
        gc.disable()
        try:
            tree = ast.parse(path.read_text(), filename=str(path))
        finally:
            gc.enable()
        yield path, tree


def imports(tree: ast.Module) -> Iterator[str]:
    """Full names of all modules that `tree` imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


@pytest.mark.parametrize("package", PACKAGES)
def test_a_service_imports_itself_and_headrace_only(package: str) -> None:
    """Services meet in Redis and on sockets, never in one process; the simulator sees policies."""
    allowed = {package, "headrace"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in sources(package)
        for name in imports(tree)
        if name.split(".")[0] in PACKAGES
        and name.split(".")[0] not in allowed
        and not (package == "headrace_sim" and name.split(".")[1:2] == ["policy"])
        and not ("cli" in path.parts and name.split(".")[0] == LAZILY.get(package))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_policies_are_pure(package: str) -> None:
    """Time, randomness and facts come in as arguments: a simulator can run the same code."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in sources(package)
        if "policy" in path.relative_to(ROOT).parts
        for name in imports(tree)
        if name.split(".")[0] in IMPURE
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "package", ["headrace", "headrace_gateway", "headrace_cache", "headrace_sim"]
)
def test_only_the_worker_needs_torch(package: str) -> None:
    """A gateway or cache image stays small and starts at once."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in sources(package)
        for name in imports(tree)
        if name.split(".")[0] in {"torch", "numpy", "transformers", "gguf", "safetensors"}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_unpickles(package: str) -> None:
    """No pickle on any socket or disk: it runs what it reads."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in sources(package)
        for name in imports(tree)
        if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_and_modules_stay_readable(package: str) -> None:
    wrong = []
    for path, tree in sources(package):
        lines = len(path.read_text().splitlines())
        if lines > MODULE_LINES_MAX:
            wrong.append(f"{path.relative_to(ROOT)}: {lines} lines, {MODULE_LINES_MAX} at most")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES_MAX:
                    wrong.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is_for(package: str) -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path, tree in sources(package)
        if tree.body and ast.get_docstring(tree) is None
    ]
    assert not wrong, "\n".join(wrong)


def test_structures_page_names_every_module() -> None:
    """The newcomer's page stays true: each module has its line, and each line its module."""
    page = (ROOT / "docs" / "structures.md").read_text()
    missing = [
        str(path.relative_to(ROOT))
        for root in PACKAGES.values()
        for path in sorted(root.rglob("*.py"))
        if path.name != "__init__.py" and f"`{path.name}`" not in page
    ]
    assert not missing, "docs/structures.md does not name:\n" + "\n".join(missing)
