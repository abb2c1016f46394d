"""The rules of the tree, written as tests: who may import whom, and what lies where."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clcore.engine.registry import STRATEGIES

ROOT = Path(__file__).parents[2]
FORBIDDEN = {"ray", "fastapi", "service"}
FOLDERS = {"clcore", "service", "deploy", "docker", "tests", "docs", "benchmarks"}
FILES = sorted((ROOT / "clcore").rglob("*.py"))


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_packages(source: str) -> set[str]:
    """Return the top-level packages that any statement of the source imports, wherever it stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_the_reader_of_imports_sees_hidden_ones() -> None:
    source = "def f():\n    from ray.train import report\n    import service.specs as s\nfrom . import x\n"
    assert imported_packages(source) == {"ray", "service"}


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_no_file_of_clcore_imports_what_it_must_not(file: Path) -> None:
    assert not imported_packages(file.read_text()) & FORBIDDEN


def test_importing_all_of_clcore_loads_neither_ray_nor_fastapi_nor_service() -> None:
    names = [module_name(file) for file in FILES]
    program = (
        "import importlib, json, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True, cwd=ROOT)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "clcore" in loaded
    assert not loaded & FORBIDDEN


def test_the_top_level_folders_are_the_ones_of_the_architecture() -> None:
    command = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
    found = {line.split("/")[0] for line in done.stdout.splitlines() if "/" in line}
    assert {name for name in found if not name.startswith(".")} == FOLDERS


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_of_the_registry_has_a_file_in_the_catalogue(name: str) -> None:
    module, _, class_name = STRATEGIES[name].partition(":")
    assert module.startswith("clcore.")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    classes = [
        node.name for node in ast.parse(Path(spec.origin).read_text()).body if isinstance(node, ast.ClassDef)
    ]
    assert class_name in classes


def test_the_readmes_tree_names_every_file_and_no_other() -> None:
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("## The tree") : text.index("## On Kubernetes")]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    packages = (ROOT / "clcore", ROOT / "service")
    files = {file for package in packages for file in package.rglob("*.py") if file.name != "__init__.py"}
    # Folders that the tree names as a whole.
    listed = {file.name for file in files if file.parent.name not in ("demo_tasks", "migrations", "versions")}
    listed = {name for name in listed if not name.startswith("routes_")}
    assert named == listed
