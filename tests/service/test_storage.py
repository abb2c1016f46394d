"""The storage contract, the same on a local disk and on a real S3 server."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.adapters import uploads
from service.adapters.storage import Storage, StorageError
from service.adapters.store_calls import RETRIES, UPLOAD_BLOCK_BYTES
from service.settings import Settings
from service.workers.ray_storage import ray_filesystem
from tests.service.s3_server import BUCKET, S3Server, running_s3


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Empty storage of one kind."""
    if request.param == "local":
        return Storage(f"file://{tmp_path}/storage")
    request.getfixturevalue("s3_environment")
    return Storage(f"s3://{BUCKET}/{tmp_path.name}")


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """This process as a client of the S3 server."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


def test_what_was_written_is_read_and_listed(storage: Storage) -> None:
    storage.write_bytes("runs/a/one.bin", b"0123456789")
    storage.write_json("runs/a/b/two.json", {"x": 1})
    storage.write_bytes("runs/empty", b"")
    storage.write_bytes("runs/a/one.bin", b"9876543210")
    assert storage.read_bytes("runs/a/one.bin") == b"9876543210"
    assert storage.read_range("runs/a/one.bin", 2, 5) == b"765"
    assert storage.read_json("runs/a/b/two.json") == {"x": 1}
    assert (storage.read_bytes("runs/empty"), list(storage.chunks("runs/empty"))) == (b"", [])
    assert storage.size("runs/a/one.bin") == 10
    assert (storage.names("runs"), storage.names("runs/a")) == (["a", "empty"], ["b", "one.bin"])
    assert storage.find("runs") == ["runs/a/b/two.json", "runs/a/one.bin", "runs/empty"]
    assert (storage.is_folder("runs/a"), storage.is_folder("runs/a/one.bin")) == (True, False)
    assert pickle.loads(pickle.dumps(storage)).read_bytes("runs/a/one.bin") == b"9876543210"


def test_what_is_absent_is_absent_and_not_a_failure(storage: Storage, tmp_path: Path) -> None:
    storage.check()
    assert (storage.names("runs"), storage.find("runs"), storage.exists("runs")) == ([], [], False)
    storage.delete("runs")
    for read in (storage.read_bytes, storage.read_json, storage.size, storage.is_folder):
        with pytest.raises(FileNotFoundError):
            read("runs/a.json")
    with pytest.raises(FileNotFoundError):
        list(storage.chunks("runs/a"))
    with pytest.raises(FileNotFoundError):
        storage.get_folder("runs/a", str(tmp_path / "copy"))


def test_another_process_sees_each_change_at_once(storage: Storage) -> None:
    other = Storage(storage.url)
    for number in range(3):
        assert storage.names("events") == [str(i) for i in range(number)]
        assert not storage.exists(f"events/{number}")
        other.write_bytes(f"events/{number}", b"x" * number)
        assert storage.exists(f"events/{number}")
        assert storage.size(f"events/{number}") == number
    other.delete("events/0")
    assert (storage.names("events"), storage.exists("events/0")) == (["1", "2"], False)
    other.delete("events")
    assert (storage.find("events"), storage.exists("events/1")) == ([], False)


def test_an_object_appears_when_its_block_ends(storage: Storage) -> None:
    with storage.open_new("a/large") as file:
        for _ in range(3):
            file.write(b"x" * UPLOAD_BLOCK_BYTES)
        assert not storage.exists("a/large")
        assert storage.find("a") == []
    assert storage.size("a/large") == 3 * UPLOAD_BLOCK_BYTES
    assert sum(len(chunk) for chunk in storage.chunks("a/large")) == 3 * UPLOAD_BLOCK_BYTES


@pytest.mark.parametrize("num_bytes", [10, 2 * UPLOAD_BLOCK_BYTES], ids=["small", "in parts"])
def test_an_upload_that_breaks_off_leaves_nothing(
    storage: Storage, num_bytes: int, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(KeyError, match="broken"):
        _break_off(storage, "a/b/large", b"x" * num_bytes)
    assert (storage.find("a"), storage.exists("a/b")) == ([], False)
    if storage.is_local:
        assert not list(Path(storage.root).rglob("*.tmp"))
    else:
        server: S3Server = request.getfixturevalue("s3_server")
        assert not server.client().call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads")


def test_a_replacement_that_breaks_off_leaves_the_old_object(storage: Storage) -> None:
    storage.write_bytes("a/b", b"old")
    with pytest.raises(KeyError, match="broken"):
        _break_off(storage, "a/b", b"new")
    assert storage.read_bytes("a/b") == b"old"


def _break_off(storage: Storage, key: str, data: bytes) -> None:
    with storage.open_new(key) as file:
        file.write(data)
        raise KeyError("broken")


def test_folders_travel_both_ways(storage: Storage, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep/er").mkdir(parents=True)
    (source / "one").write_bytes(b"1")
    (source / "deep/er/two").write_bytes(b"22")
    storage.put_folder(str(source), "folder")
    assert storage.find("folder") == ["folder/deep/er/two", "folder/one"]
    storage.get_folder("folder", str(target))
    assert (target / "one").read_bytes() == b"1"
    assert (target / "deep/er/two").read_bytes() == b"22"


def test_ray_train_reads_and_writes_through_it(storage: Storage, tmp_path: Path) -> None:
    from pyarrow import fs

    (tmp_path / "checkpoint/sub").mkdir(parents=True)
    (tmp_path / "checkpoint/state").write_bytes(b"s" * 100_000)
    (tmp_path / "checkpoint/sub/more").write_bytes(b"m")
    ours = pickle.loads(pickle.dumps(ray_filesystem(storage)))
    assert ours == ray_filesystem(storage)
    fs.copy_files(str(tmp_path / "checkpoint"), "runs/r/train/a1/c1", destination_filesystem=ours)
    assert storage.read_bytes("runs/r/train/a1/c1/state") == b"s" * 100_000
    fs.copy_files("runs/r/train/a1/c1", str(tmp_path / "back"), source_filesystem=ours)
    assert (tmp_path / "back/sub/more").read_bytes() == b"m"
    (info, absent) = ours.get_file_info(["runs/r/train/a1/c1/state", "runs/none"])
    assert (info.size, absent.type) == (100_000, fs.FileType.NotFound)
    ours.delete_dir("runs/r/train/a1/c1")
    assert storage.find("runs/r") == []
    assert ours.get_file_info(fs.FileSelector("runs/r", allow_not_found=True)) == []


def test_a_relative_folder_is_the_same_one_for_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    given = {url: Settings(home=tmp_path / "home", storage_url=url).storage_url for url in ("data/x", "~/y")}
    assert given == {"data/x": f"file://{tmp_path}/data/x", "~/y": f"file://{tmp_path}/me/y"}


@pytest.mark.parametrize("key", ["../up", "a/../b", "/root", "a//b", "", "a b", "a/", ".", "./a"])
def test_a_key_that_could_leave_the_root_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="bad storage key"):
        Storage(f"file://{tmp_path}").read_bytes(key)


# -------------------------------------------------------------------------------------------- local disks


def test_a_local_object_is_on_the_disk_before_it_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    def replaced(source: str, target: str) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(uploads.os, "fsync", synced)
    monkeypatch.setattr(uploads.os, "replace", replaced)
    Storage(f"file://{tmp_path}/root").write_bytes("a/b", b"1")
    temporary = next(step for step in done if step.endswith(".tmp"))
    assert done == [f"sync {tmp_path.name}", "sync root", temporary, "rename", "sync a"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_at_once_and_leaves_what_was_there(small_disk: Path) -> None:
    storage = Storage(f"file://{small_disk}", patience_s=60)
    storage.write_bytes("kept", b"x" * 500_000)
    for _ in range(3):
        with pytest.raises(StorageError, match="No space left") as failed:
            storage.write_bytes("new/one", b"y" * 800_000)
        assert not failed.value.may_pass
    assert failed.value.__cause__.errno == errno.ENOSPC  # type: ignore[union-attr]
    assert storage.find("new") == []
    assert storage.read_bytes("kept") == b"x" * 500_000
    storage.delete("kept")
    storage.write_bytes("new/one", b"y" * 800_000)


def test_a_call_is_repeated_and_then_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(f"file://{tmp_path}")
    storage.write_bytes("a", b"1")
    calls, pauses = 0, []

    def refuse(*_: object, **__: object) -> bytes:
        nonlocal calls
        calls += 1
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    monkeypatch.setattr("service.adapters.store_calls.time.sleep", pauses.append)
    monkeypatch.setattr(storage.fs, "cat_file", refuse)
    with pytest.raises(StorageError, match="cannot read 'a': ConnectionResetError"):
        storage.read_bytes("a")
    assert calls == 1 + RETRIES
    assert pauses == [0.1, 0.2, 0.4, 0.8]
    calls = 0
    with pytest.raises(StorageError):
        storage.without_patience().read_bytes("a")
    assert calls == 1


# --------------------------------------------------------------------------------------------- S3 servers


def test_a_wrong_secret_is_refused_and_a_missing_bucket_is_a_failure(
    s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    Storage(f"s3://{BUCKET}/secret").write_bytes("a", b"1")
    with pytest.raises(StorageError, match="bucket does not exist") as failed:
        Storage("s3://no-such-bucket/x").without_patience().exists("a")
    assert failed.value.may_pass  # a store that has just started may not know its buckets yet
    for name, value in s3_environment.environment(secret="wrong").items():
        monkeypatch.setenv(name, value)
    stranger = Storage(f"s3://{BUCKET}/secret", patience_s=60)
    for call in (
        stranger.read_bytes,
        stranger.exists,
        stranger.names,
        lambda key: stranger.write_bytes(key, b""),
    ):
        with pytest.raises(StorageError, match="PermissionError") as failed:
            call("a")
        assert not failed.value.may_pass


def test_a_store_that_is_away_is_a_failure_and_is_used_again_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_s3(tmp_path / "s3") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        storage = Storage(f"s3://{BUCKET}/x")
        storage.write_bytes("a", b"1")
        server.kill()
        for call in (
            storage.read_bytes,
            storage.exists,
            storage.names,
            lambda key: storage.write_bytes(key, b""),
        ):
            with pytest.raises(StorageError) as failed:
                call("a")
            assert failed.value.may_pass
        with pytest.raises(StorageError):
            storage.check()
        server.start()
        assert storage.read_bytes("a") == b"1"
