"""Files of a version, checked against its manifest on every load."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from service.adapters.manifest import MANIFEST_NAME, Manifest, ManifestFile
from service.adapters.storage import Storage
from service.adapters.store_calls import DamagedFile


def read_manifest(storage: Storage, task_dir: str) -> Manifest:
    """Read the manifest of a task directory. Raises FileNotFoundError."""
    return Manifest.model_validate_json(storage.read_bytes(f"{task_dir}/{MANIFEST_NAME}"))


def fetch_folder(storage: Storage, task_dir: str, folder: str, local: Path) -> None:
    """Copy the files of one folder of a version into a local folder, each one checked.

    Raises DamagedFile naming the file, the expected and the found digest; FileNotFoundError when there is no
    such version.
    """
    manifest = read_manifest(storage, task_dir)
    wanted = {name: file for name, file in manifest.files.items() if name.startswith(f"{folder}/")}
    if not wanted:
        raise DamagedFile(f"the manifest of {task_dir} lists no file in {folder}/")
    for name, expected in wanted.items():
        target = local / name.removeprefix(f"{folder}/")
        try:
            storage.get_file(f"{task_dir}/{name}", target)
        except FileNotFoundError as error:
            raise DamagedFile(f"{task_dir}/{name} is in its manifest but not in storage") from error
        with target.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        _check(f"{task_dir}/{name}", target.stat().st_size, found, expected)


def read_file(storage: Storage, task_dir: str, files: Mapping[str, ManifestFile], name: str) -> bytes:
    """Read one file of a version, checked. files: its manifest's. Raises DamagedFile, KeyError."""
    data = storage.read_bytes(f"{task_dir}/{name}")
    _check(f"{task_dir}/{name}", len(data), hashlib.sha256(data).hexdigest(), files[name])
    return data


def _check(key: str, num_bytes: int, found: str, expected: ManifestFile) -> None:
    if (num_bytes, found) != (expected.bytes, expected.sha256):
        raise DamagedFile(
            f"{key} is damaged: {num_bytes} bytes with sha256 {found}, "
            f"its manifest says {expected.bytes} bytes with sha256 {expected.sha256}"
        )
