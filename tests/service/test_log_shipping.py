"""What processes print is in storage while they work and after they are gone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service.adapters.logs import log_processes, log_text
from service.adapters.storage import Storage, StorageError, logs_key
from service.workers.log_shipping import SEGMENT_BYTES, LogShipper
from tests.service.control import Service, wait_until
from tests.service.test_cli import clpeft

HUGE = "x" * (2 * SEGMENT_BYTES + 100)
PROGRAM = """
import os, sys, time
from service.adapters.storage import Storage
from service.workers.log_shipping import shipped_log
with shipped_log(Storage(sys.argv[1]), "run_1", int(sys.argv[2]), "driver"):
    {body}
"""


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Empty storage."""
    return Storage(f"file://{tmp_path}/storage")


def start(storage: Storage, body: str, attempt: int = 1) -> subprocess.Popen[bytes]:
    """Start a process that ships its log; its output goes to one file, as a Ray driver's does."""
    log = Path(storage.root).parent / f"{attempt}.log"
    command = [sys.executable, "-c", PROGRAM.format(body=body), storage.url, str(attempt)]
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def shipped(storage: Storage, attempt: int = 1, process: str = "driver") -> str:
    """What storage has of a process."""
    return "".join(log_text(storage, "run_1", attempt, process))


def test_an_exception_leaves_its_traceback_and_all_that_was_printed(storage: Storage) -> None:
    body = "print('to stdout', flush=True); print('to stderr', file=sys.stderr); print(1 / 0)"
    assert start(storage, body).wait(60) == 1
    text = shipped(storage)
    assert text.startswith("to stdout\nto stderr\nTraceback")
    assert "ZeroDivisionError: division by zero" in text


def test_what_was_printed_is_there_while_the_process_works_and_after_it_was_killed(storage: Storage) -> None:
    process = start(storage, "print('hello', flush=True); time.sleep(600)")
    wait_until(lambda: shipped(storage) == "hello\n", "the first line", timeout_s=60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert shipped(storage) == "hello\n"


def test_two_attempts_keep_separate_logs(storage: Storage) -> None:
    for attempt in (1, 2):
        assert start(storage, f"print('attempt', {attempt})", attempt).wait(60) == 0
    assert (shipped(storage, 1), shipped(storage, 2)) == ("attempt 1\n", "attempt 2\n")


def test_output_to_a_pipe_is_left_to_its_reader(storage: Storage) -> None:
    command = [sys.executable, "-c", PROGRAM.format(body="print('piped')"), storage.url, "1"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert done.stdout == b"piped\n"
    assert log_processes(storage, "run_1", 1) == []


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """An empty log file."""
    path = tmp_path / "log"
    path.touch()
    return path


def append(path: Path, data: bytes) -> None:
    """Print as another process would."""
    with path.open("ab") as file:
        file.write(data)


def test_segments_end_with_lines_and_the_rest_comes_at_the_end(storage: Storage, log: Path) -> None:
    shipper = LogShipper(storage, f"{logs_key('run_1', 1)}/driver", (str(log),))
    append(log, b"one\ntwo\nthr")
    shipper.ship()
    shipper.ship()
    append(log, b"ee\nfour")
    shipper.ship()
    assert storage.names(f"{logs_key('run_1', 1)}/driver") == [f"{0:012d}.log", f"{8:012d}.log"]
    assert shipped(storage) == "one\ntwo\nthree\n"
    shipper.ship(is_end=True)
    assert shipped(storage) == "one\ntwo\nthree\nfour"


def test_a_huge_line_and_bytes_that_are_no_text_arrive_whole(storage: Storage, log: Path) -> None:
    shipper = LogShipper(storage, f"{logs_key('run_1', 1)}/driver", (str(log),))
    data = HUGE.encode() + b"\n\xff\xfe \x80 end\n" + "\u00e9".encode()[:1]
    append(log, data)
    shipper.ship(is_end=True)
    keys = storage.find(logs_key("run_1", 1))
    assert len(keys) > 2
    assert b"".join(storage.read_bytes(key) for key in keys) == data
    assert max(storage.size(key) for key in keys) <= SEGMENT_BYTES
    assert shipped(storage) == f"{HUGE}\n\ufffd\ufffd \ufffd end\n\ufffd"


def test_a_letter_cut_between_two_segments_is_read_whole(storage: Storage, log: Path) -> None:
    shipper = LogShipper(storage, f"{logs_key('run_1', 1)}/driver", (str(log),))
    append(log, b"x" * (SEGMENT_BYTES - 1) + "\u00e9".encode() + b"\n")
    shipper.ship()
    assert len(storage.find(logs_key("run_1", 1))) == 2
    assert shipped(storage) == "x" * (SEGMENT_BYTES - 1) + "\u00e9\n"


def test_what_the_store_did_not_take_is_shipped_later(
    storage: Storage, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipper = LogShipper(storage, f"{logs_key('run_1', 1)}/driver", (str(log),))

    def refuse(*_: object) -> None:
        raise StorageError("away")

    append(log, b"one\n")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", refuse)
        with pytest.raises(StorageError):
            shipper.ship()
    append(log, b"two\n")
    shipper.ship()
    assert shipped(storage) == "one\ntwo\n"


def test_two_processes_of_one_name_keep_separate_logs(storage: Storage, log: Path) -> None:
    append(log, b"line\n")
    for _ in range(3):
        LogShipper(storage, f"{logs_key('run_1', 1)}/worker-0-7", (str(log),)).ship()
    assert log_processes(storage, "run_1", 1) == ["worker-0-7", "worker-0-7.2", "worker-0-7.3"]


# -------------------------------------------------------------------------------------------------- the route


def test_stored_logs_are_served_when_the_cluster_is_gone(service: Service) -> None:
    job = service.submit("one")
    path, run = f"/v1/jobs/{job['id']}/logs", job["runs"][0]["id"]
    service.reconciler.tick()
    storage, folder = service.storage, logs_key(run, 1)
    storage.write_bytes(f"{folder}/driver/{0:012d}.log", b"first\n")
    storage.write_bytes(f"{folder}/driver/{6:012d}.log", b"\xffsecond\n")
    storage.write_bytes(f"{folder}/worker-0-12/{0:012d}.log", b"of the worker\n")
    service.runner.is_reachable = False
    shown = service.client.get(path)
    assert shown.text == "first\n\ufffdsecond\n"
    assert shown.headers["x-log-processes"] == "driver, worker-0-12"
    assert shown.headers["content-type"].startswith("text/plain")
    chosen = service.client.get(path, params={"run": run, "attempt": 1, "process": "worker-0-12"})
    assert chosen.text == "of the worker\n"
    absent = service.client.get(path, params={"process": "../../plan.json"})
    assert (absent.status_code, absent.json()["code"]) == (404, "no_log")
    assert "it has: driver, worker-0-12" in absent.json()["detail"]
    for params, said in (
        ({"attempt": 2}, f"job {job['id']} has no attempt 2; it has: 1"),
        ({"run": "run_other"}, f"job {job['id']} has no run 'run_other'"),
    ):
        absent = service.client.get(path, params=params)
        assert (absent.status_code, absent.json()["detail"]) == (404, said)


def test_the_command_prints_a_log_and_names_the_other_processes(service: Service, tmp_path: Path) -> None:
    job = service.submit("one")
    service.reconciler.tick()
    folder = logs_key(job["runs"][0]["id"], 1)
    service.storage.write_bytes(f"{folder}/driver/{0:012d}.log", b"first\n")
    service.storage.write_bytes(f"{folder}/worker-0-12/{0:012d}.log", b"of the worker\n")
    shown = clpeft("logs", job["id"], home=tmp_path, url=str(service.client.base_url))
    assert (shown.stdout, shown.stderr) == ("first\n", "more with --process: worker-0-12\n")
    other = clpeft("logs", job["id"], "--process", "x", home=tmp_path, url=str(service.client.base_url))
    assert other.returncode == 1
    assert "no log of 'x'; it has: driver, worker-0-12" in other.stderr
