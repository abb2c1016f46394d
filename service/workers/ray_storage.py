"""The service's storage as the file system of Ray Train's checkpoints: the same repeats and atomicity."""

from __future__ import annotations

import io
import posixpath
import tempfile
from typing import IO, Any

from pyarrow import PythonFile  # type: ignore[import-untyped]
from pyarrow.fs import (  # type: ignore[import-untyped]
    FileInfo,
    FileSelector,
    FileSystemHandler,
    FileType,
    PyFileSystem,
)

from service.adapters.storage import Storage


def ray_filesystem(storage: Storage) -> PyFileSystem:
    """Return a pyarrow file system whose paths are storage keys."""
    return PyFileSystem(_StorageHandler(storage))


class _StorageHandler(FileSystemHandler):  # type: ignore[misc]
    """Folders exist through what lies in them, as on an object store."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def __reduce__(self) -> tuple[type[_StorageHandler], tuple[Storage]]:
        return _StorageHandler, (self._storage,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _StorageHandler) and self._storage.url == other._storage.url

    def __hash__(self) -> int:
        return hash(self._storage.url)

    def get_type_name(self) -> str:
        return "clpeft-storage"

    def normalize_path(self, path: str) -> str:
        return path.strip("/")

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [self._info(path.strip("/")) for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        base = selector.base_dir.strip("/")
        found = self._storage.find(base)
        if not found and not selector.allow_not_found:
            raise FileNotFoundError(base)
        files = [key for key in found if selector.recursive or posixpath.dirname(key) == base]
        folders = {folder for key in found for folder in _folders_between(base, key)}
        if not selector.recursive:
            folders = {folder for folder in folders if posixpath.dirname(folder) == base}
        infos = [FileInfo(folder, FileType.Directory) for folder in sorted(folders)]
        return infos + [FileInfo(key, FileType.File, size=self._storage.size(key)) for key in files]

    def create_dir(self, path: str, recursive: bool) -> None:
        pass

    def delete_dir(self, path: str) -> None:
        self._storage.delete(path.strip("/"))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:  # noqa: ARG002
        self._storage.delete(path.strip("/"))

    def delete_file(self, path: str) -> None:
        self._storage.delete(path.strip("/"))

    def open_input_stream(self, path: str) -> PythonFile:
        file = tempfile.TemporaryFile()  # noqa: SIM115
        file.writelines(self._storage.chunks(path.strip("/")))
        file.seek(0)
        return PythonFile(file, mode="r")

    def open_input_file(self, path: str) -> PythonFile:
        return self.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: Any) -> PythonFile:  # noqa: ARG002
        return PythonFile(_NewObject(self._storage, path.strip("/")), mode="w")

    # pyarrow's interface asks for these four; Ray Train never calls them, and here they have no meaning.

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("Ray Train never empties its whole storage")

    def open_append_stream(self, path: str, metadata: Any) -> PythonFile:
        raise NotImplementedError("objects are written whole")

    def move(self, src: str, dest: str) -> None:
        raise NotImplementedError("objects do not move")

    def copy_file(self, src: str, dest: str) -> None:
        raise NotImplementedError("objects are not copied")

    def _info(self, key: str) -> FileInfo:
        try:
            if self._storage.is_folder(key):
                return FileInfo(key, FileType.Directory)
            return FileInfo(key, FileType.File, size=self._storage.size(key))
        except FileNotFoundError:
            return FileInfo(key, FileType.NotFound)


class _NewObject(io.RawIOBase):
    """Collects an object on the local disk and stores it when it is closed."""

    def __init__(self, storage: Storage, key: str) -> None:
        self._storage, self._key = storage, key
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        with self._file:
            self._storage.write_file(self._key, self._file)


def _folders_between(base: str, key: str) -> list[str]:
    """Return the folders under base that lead to a key."""
    folders, folder = [], posixpath.dirname(key)
    while len(folder) > len(base):
        folders.append(folder)
        folder = posixpath.dirname(folder)
    return folders
