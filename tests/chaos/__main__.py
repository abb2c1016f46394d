"""Kill every part of a running service in every phase of a job: python -m tests.chaos --json OUT."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from service.processes import interrupt_on_signals
from tests.chaos.board import Board, print_summary
from tests.chaos.cases import Case, all_runs, quick_runs
from tests.chaos.hosts import LOOPBACK, Hosts
from tests.chaos.links import CUTS, why_no_namespaces
from tests.chaos.play import Result
from tests.chaos.results import Results
from tests.chaos.stands import Stands


def main() -> int:
    """Play the cases; 0 when all hold, 1 when one fails, 3 when one could not be played."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="where the results go")
    parser.add_argument("--quick", action="store_true", help="ten kills over three runs")
    parser.add_argument("--resume", action="store_true", help="go on after the cases that OUT says hold")
    parser.add_argument("--only", metavar="CASE", help="cases that begin so: PART, PART/PHASE or stop-PART")
    arguments = parser.parse_args()
    runs = quick_runs() if arguments.quick else [*all_runs(), CUTS]
    if arguments.only:
        runs = [run for cases in runs if (run := tuple(c for c in cases if c.id.startswith(arguments.only)))]
    if not runs:
        parser.error(f"no case begins with {arguments.only!r}")
    interrupt_on_signals()  # SIGTERM too ends the stand in order
    results = Results(arguments.json, [case.id for run in runs for case in run], resume=arguments.resume)
    with Board(runs, results.rows) as board:
        for cases, hosts in ((_here(runs), LOOPBACK), (_cuts(runs), None)):
            _play(cases, hosts, results, board)
    rows, targets = results.ordered(), results.targets()
    print_summary(rows, targets)
    if any(not row["ok"] and not row["skipped"] for row in rows):
        return 1
    return 3 if any(row["skipped"] for row in rows) else 0


def _here(runs: Sequence[tuple[Case, ...]]) -> list[tuple[Case, ...]]:
    return [run for run in runs if run[0].action != "cut"]


def _cuts(runs: Sequence[tuple[Case, ...]]) -> list[tuple[Case, ...]]:
    return [(case,) for run in runs if run[0].action == "cut" for case in run]


def _play(runs: Sequence[tuple[Case, ...]], hosts: Hosts | None, results: Results, board: Board) -> None:
    """Play runs on one stand; after a failure each case of the run is played again alone, on a new stand."""
    queue = [left for run in runs if (left := tuple(case for case in run if case.id not in results.rows))]
    if hosts is None and queue and (reason := why_no_namespaces()) is not None:
        for case in (case for run in queue for case in run):
            row = Result(case, problems=[reason]).row() | {"skipped": True}
            results.add([row])
            board.finished(row)
        return
    with Stands(hosts, board, logs=results.logs) as stands:
        for number, run in enumerate(queue):
            played = stands.play(run, f"{run[0].action}-{number}")
            problems = [problem for result in played for problem in result.problems]
            if len(run) > 1 and problems:
                board.say(f"{run[0].id} and its run fail together; now each alone: {problems[0]}")
                played = [
                    result
                    for case in run
                    for result in stands.play((case,), f"alone-{case.part}-{case.phase}")
                ]
            for result in played:
                results.add([result.row()])
                board.finished(results.rows[result.case.id])


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
