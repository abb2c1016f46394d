"""The tools of the chaos run, without a stand; and, when chosen by -m chaos, its quick form."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from service.processes import free_ports
from tests.chaos.cases import PAIRS, PER_RUN, STOP_RUNS, all_runs, quick_runs
from tests.chaos.gate import Gate, Wanted
from tests.chaos.parts import PARTS
from tests.chaos.phases import PHASES
from tests.chaos.results import Results


def test_every_pair_is_played_once_in_the_order_of_its_job() -> None:
    runs = all_runs()
    played = [case.id for run in runs for case in run if case.action == "kill"]
    assert sorted(played) == sorted(f"{part}/{phase}" for phase, parts in PAIRS.items() for part in parts)
    assert all(1 <= len(run) <= PER_RUN for run in runs)
    for run in [*runs, *quick_runs()]:
        places = [(case.task, PHASES.index(case.phase)) for case in run]
        assert places == sorted(set(places))
        ends = {(case.phase, case.task) for case in run}
        assert not any({("committing", task), ("publishing", task)} <= ends for task in (0, 1))


def test_every_part_is_killed_and_stopped() -> None:
    assert {part for parts in PAIRS.values() for part in parts} == set(PARTS)
    assert sorted(part for parts in STOP_RUNS for part in parts) == sorted(PARTS)


def test_the_quick_form_is_ten_kills_over_three_runs() -> None:
    runs = quick_runs()
    assert len(runs) == 3
    assert len({case.id for run in runs for case in run}) == 10


class Store(BaseHTTPRequestHandler):
    """Keeps what is put, and answers it."""

    kept: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        self.kept[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(self.kept.get(self.path, b"nothing"))

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate before a small store."""
    Store.kept = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (port,) = free_ports(1)
    opened = Gate(("127.0.0.1", port), ("127.0.0.1", server.server_port))
    opened.start()
    yield opened
    opened.close()
    server.shutdown()
    server.server_close()


def put(url: str, body: bytes, timeout_s: float = 20.0) -> int:
    return httpx.put(url, content=body, timeout=timeout_s, trust_env=False).status_code


def test_the_gate_passes_everything_on_and_holds_what_a_rule_names(gate: Gate) -> None:
    big = bytes(range(256)) * 4000
    assert put(f"{gate.url}/a/big", big) == 200
    assert httpx.get(f"{gate.url}/a/big", trust_env=False).content == big
    rule = gate.add(Wanted(r"^PUT /a/manifest", '"task": "t1"'), after=Wanted("^PUT /a/first"))
    for path, body in (("manifest", b'{"task": "t1"}'), ("first", b""), ("manifest", b'{"task": "t0"}')):
        assert put(f"{gate.url}/a/{path}", body) == 200, "sleeping, or another body"
    held = threading.Thread(target=put, args=(f"{gate.url}/a/manifest", b'{"task": "t1"}'))
    held.start()
    assert rule.caught.wait(10)
    assert Store.kept["/a/manifest"] == b'{"task": "t0"}'
    gate.release(rule)
    held.join()
    assert Store.kept["/a/manifest"] == b'{"task": "t1"}'


def test_what_a_killed_client_wanted_to_write_never_arrives(gate: Gate) -> None:
    rule = gate.add(Wanted(r"^PUT /a"))
    with pytest.raises(httpx.ReadTimeout):
        put(f"{gate.url}/a/1", b"late", timeout_s=0.5)
    time.sleep(0.2)
    gate.release(rule)
    assert put(f"{gate.url}/a/2", b"new") == 200
    assert Store.kept == {"/a/2": b"new"}


def test_results_go_on_from_the_cases_that_held(tmp_path: Path) -> None:
    path = tmp_path / "out.json"

    def row(case: str, *, ok: bool) -> dict[str, object]:
        part, phase = case.split("/")
        return {
            "case": case,
            "part": part,
            "phase": phase,
            "action": "kill",
            "recovery_s": 12.0,
            "ok": ok,
            "problems": [],
        }

    first = Results(path, ["driver/training", "api/training"], resume=False)
    first.add([row("driver/training", ok=True), row("api/training", ok=False)])
    assert [entry["ok"] for entry in first.targets()] == [False, True, False, False, False]
    again = Results(path, ["driver/training", "api/training"], resume=True)
    assert list(again.rows) == ["driver/training"]
    assert Results(path, ["driver/training"], resume=False).rows == {}


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_ten_kills_over_three_runs_all_hold(tmp_path: Path) -> None:
    out = tmp_path / "quick.json"
    done = subprocess.run([sys.executable, "-m", "tests.chaos", "--quick", "--json", str(out)], check=False)
    rows = json.loads(out.read_text())["rows"]
    assert [row for row in rows if not row.get("ok", True)] == []
    assert done.returncode == 0
