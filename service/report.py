"""The one shape that every benchmark, chaos run and the demo write with --json OUT.

{"name": str, "environment": {...}, "rows": [{...}], "targets": [{"what", "value", "limit", "ok"}]}
`rows` holds what was measured; `targets` holds each figure that was promised, with its limit.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("cl-peft", "ray", "torch", "transformers", "peft", "fastapi", "pydantic", "sqlalchemy", "numpy")


def target(what: str, value: float | None, limit: str, ok: bool) -> dict[str, Any]:
    """Return one promised figure: what, its value, its limit in words ("<= 900 s") and whether it holds."""
    if value is not None and not math.isfinite(value):
        raise ValueError(f"target {what!r}: value must be finite or None, got {value}")
    return {"what": what, "value": value, "limit": limit, "ok": bool(ok)}


def write_report(
    path: str | Path, name: str, rows: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]
) -> None:
    """Write a report, whole or not at all. Raises ValueError for NaN or infinity: JSON has neither."""
    report = {
        "name": name,
        "environment": environment(),
        "rows": [dict(row) for row in rows],
        "targets": [dict(entry) for entry in targets],
    }
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def environment() -> dict[str, Any]:
    """Return what figures depend on: processor, memory, system and versions; no host names or paths."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {package: version for package in PACKAGES if (version := _version(package))},
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
