"""Reports: what they tell, from storage alone, and the same bytes from the same artefacts."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.job_report.facts import read_facts
from service.job_report.write import WRITERS
from tests.service.control import Service, serve, write_events, write_task

GENERAL = {"dataset": "default", "sha256": "0" * 64, "num_rows": 100, "base": 0.10}
TRAINING = {
    "num_steps": 2.0,
    "label_tokens": 40.0,
    "total_tokens": 400.0,
    "replay_tokens": 0.0,
    "final_loss": 0.25,
    "train_s": 3.0,
    "strategy_s": 1.0,
    "evaluate_s": 2.0,
    "strategy/penalty": 0.5,
}


def finished_job(service: Service, name: str = "demo", *, forgets: bool = True) -> dict[str, Any]:
    """A job of two tasks; the second makes it forget two of the first task's four rows, or none."""
    job = service.submit("one", "two", name=name, evaluation={"curve_points": 1})
    service.reconciler.tick()
    run = job["runs"][0]["id"]
    steps = [("step", {"task": "one", "step": s, "num_steps": 2, "loss": 1.0 / s}) for s in (1, 2)]
    write_events(service.storage, run, 1, 1, [("run.started", {}), *steps])
    common = {"training": TRAINING, "evaluation": {"metric": "exact_match"}, "environment": {"torch": "2.13"}}
    write_task(
        service.storage,
        run,
        1,
        0,
        scores={"one": 0.75, "two": 0.25},
        base_scores={"one": 0.0, "two": 0.0},
        predictions={
            "one": [1, 1, 1, 0],
            "two": [0, 1, 0, 0],
            "base/one": [0, 0, 0, 0],
            "base/two": [0, 0, 0, 0],
        },
        general={**GENERAL, "before": 0.10, "after": 0.08},
        **common,
    )
    last = [1, 0, 0, 0] if forgets else [1, 1, 1, 0]
    write_task(
        service.storage,
        run,
        1,
        1,
        scores={"one": sum(last) / 4, "two": 1.0},
        predictions={"one": last, "two": [1, 1, 1, 1]},
        general={**GENERAL, "before": 0.08, "after": 0.05},
        curve=[{"step": 0, "scores": {"one": 0.75}}, {"step": 1, "scores": {"one": 0.5}}],
        **common,
    )
    service.reconciler.tick()
    assert service.job(job["id"])["num_committed"] == 2
    return job


def facts_of(service: Service, job: dict[str, Any]) -> dict[str, Any]:
    """The report as JSON."""
    answer = service.client.get(f"/v1/jobs/{job['id']}/report", params={"format": "json"})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_report_tells_scores_costs_data_and_lineage(service: Service) -> None:
    job = finished_job(service)
    facts = facts_of(service, job)
    assert facts["accuracy"]["matrix"] == [[0.75, 0.25], [0.25, 1.0]]
    # 0.75 - 0.25 is forgotten; mean of 0.25 and 1.0; two of "one"'s rows were right and are wrong now
    assert (facts["accuracy"]["forgetting"], facts["accuracy"]["average_accuracy"]) == (0.5, 0.625)
    assert facts["lost_rows"] == {"one": [1, 2]}
    assert facts["curves"]["loss"]["one"] == [[1, 1.0], [2, 0.5]]
    assert [point["step"] for point in facts["curves"]["scores"]["two"]] == [0, 1]
    assert facts["costs_s"]["one"] == {"train_s": 3.0, "strategy_s": 1.0, "evaluate_s": 2.0}
    assert facts["strategy_figures"]["two"] == {"penalty": 0.5}
    assert facts["general"][0]["delta"] == pytest.approx(-0.02)
    assert facts["general"][1]["relative_drop"] == pytest.approx(0.375)  # 1 - 0.05 / 0.08
    shown = service.client.get(f"/v1/datasets/{facts['tasks'][0]['dataset']['id']}").json()
    assert facts["tasks"][0]["dataset"]["sha256"] == shown["sha256"]
    assert [entry["version"] for entry in facts["lineage"]] == [1, 2]
    assert facts["lineage"][1]["parent_dir"] == facts["lineage"][0]["task_dir"]
    assert facts["environments"] == [{"tasks": ["one", "two"], "environment": {"torch": "2.13"}}]


def test_intervals_hold_the_scalar_and_widen_with_disagreeing_rows(service: Service) -> None:
    job = finished_job(service)
    accuracy = facts_of(service, job)["accuracy"]
    for name in ("average_accuracy", "forgetting", "bwt", "fwt", "learning_accuracy"):
        low, high = accuracy["intervals_95"][name]
        assert low <= accuracy[name] <= high
    # Rows of task one change by 0, 1, 1, 0 with equal odds: the mean of four draws is 0 with odds 1/16.
    assert accuracy["intervals_95"]["forgetting"] == [0.0, 1.0]


def test_the_change_of_general_ability_has_an_interval_over_the_same_texts(service: Service) -> None:
    job = service.submit("one")
    service.reconciler.tick()
    # Each text loses the same share, so that every resample says the same, whatever the texts' own nll is.
    before, after = [(30.0, 10), (5.0, 20)], [(31.0, 10), (7.0, 20)]
    drop = 1 - math.exp(-0.1)
    write_task(
        service.storage,
        job["runs"][0]["id"],
        1,
        0,
        evaluation={"metric": "exact_match"},
        general={**GENERAL, "before": math.exp(-35 / 30), "after": math.exp(-38 / 30)},
        predictions={"general/before": before, "general/after": after},
    )
    service.reconciler.tick()
    [general] = facts_of(service, job)["general"]
    assert general["relative_drop"] == pytest.approx(drop)
    assert general["relative_drop_interval_95"] == pytest.approx([drop, drop])


def test_the_matrix_comes_with_the_same_intervals(service: Service) -> None:
    job = finished_job(service)
    shown = service.client.get(f"/v1/jobs/{job['id']}/eval-matrix").json()
    assert shown["intervals_95"] == facts_of(service, job)["accuracy"]["intervals_95"]


def test_the_score_before_an_appended_task_gives_its_forward_transfer(service: Service) -> None:
    job = service.submit("one")
    service.reconciler.tick()
    write_task(service.storage, job["runs"][0]["id"], 1, 0, scores={"one": 1.0}, base_scores={"one": 0.0})
    service.reconciler.tick()
    task = {"name": "late", "dataset": service.upload("late"), "steps": 2}
    run = service.client.post(f"/v1/jobs/{job['id']}/tasks", json=task).json()["runs"][1]["id"]
    service.reconciler.tick()
    write_task(
        service.storage,
        run,
        1,
        1,
        scores={"one": 1.0, "late": 0.9},
        base_scores={"late": 0.1},
        before_scores={"late": 0.3},
    )
    service.reconciler.tick()
    shown = service.client.get(f"/v1/jobs/{job['id']}/eval-matrix").json()
    assert shown["matrix"] == [[1.0, 0.3], [1.0, 0.9]]
    assert shown["fwt"] == pytest.approx(0.2)  # 0.3 before it was trained, 0.1 by the base model
    assert shown["intervals_95"] == {}  # this worker left no rows


@pytest.mark.parametrize("form", ["html", "md", "json"])
def test_the_same_artefacts_give_the_same_bytes_without_the_database(service: Service, form: Any) -> None:
    job = finished_job(service)
    answer = service.client.get(f"/v1/jobs/{job['id']}/report", params={"format": form})
    facts = facts_of(service, job)
    read = read_facts(service.storage, [entry["task_dir"] for entry in facts["lineage"]])
    assert WRITERS[form](read, None).encode() == answer.content


def test_markdown_shows_the_matrix_and_what_was_lost(service: Service) -> None:
    job = finished_job(service)
    text = service.client.get(f"/v1/jobs/{job['id']}/report", params={"format": "md"}).text
    assert "| one | 0.750 | 0.250 |\n| two | 0.250 | 1.000 |" in text
    assert "| one | 2 | 1, 2 |" in text
    assert "| one | 10.00 | 12.50 | -20.00 % |" in text  # perplexity, and the change of its inverse
    assert re.search(r"\| forgetting \| 0\.500 \[0\.000, 1\.000\] \|", text)


def test_a_baseline_stands_beside_the_job_with_what_differs(service: Service) -> None:
    job, other = finished_job(service), finished_job(service, "other", forgets=False)
    query = {"format": "md", "baseline": other["id"]}
    text = service.client.get(f"/v1/jobs/{job['id']}/report", params=query).text
    assert f"| figure | {job['id']} | baseline {other['id']} | difference |" in text
    assert re.search(r"\| forgetting \| 0\.500 \[.*\] \| 0\.000 \[.*\] \| \+0\.500 \|", text)


def test_scores_of_different_metrics_are_not_subtracted(service: Service) -> None:
    job, other = finished_job(service), finished_job(service, "other")
    found = facts_of(service, job), facts_of(service, other)
    found[1]["configuration"]["evaluation"]["metric"] = "perplexity"
    found[1]["tasks"][0]["steps"] = 7
    text = WRITERS["md"](*found)
    assert "No difference is taken between scores by exact_match and by perplexity." in text
    assert re.search(r"\| forgetting \| 0\.500 \[.*\] \| 0\.500 \[.*\] \| - \|", text)
    assert "training steps" in text


def test_a_report_says_how_many_tasks_are_still_to_come(service: Service) -> None:
    job = service.submit("one", "two")
    service.reconciler.tick()
    write_task(service.storage, job["runs"][0]["id"], 1, 0, evaluation={"metric": "exact_match"})
    service.reconciler.tick()
    text = service.client.get(f"/v1/jobs/{job['id']}/report", params={"format": "md"}).text
    assert "1 of 2 tasks trained; v1 is the newest version." in text


def test_numbers_stand_on_the_right_and_words_on_the_left(service: Service) -> None:
    job = finished_job(service)
    page = WRITERS["html"](facts_of(service, job), None)
    assert '<th class="text">meaning</th>' in page
    assert "<th>value</th>" in page
    assert "<td>0.500 [0.000, 1.000]</td>" in page


def test_html_opens_without_a_network_and_holds_every_picture(service: Service) -> None:
    job = finished_job(service)
    page = service.client.get(f"/v1/jobs/{job['id']}/report").text
    assert page.startswith("<!DOCTYPE html>") or page.startswith("<!doctype html>")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?https?:", page)
    assert len(re.findall(r"<figure", page)) == 6


def test_names_from_users_cannot_become_markup(service: Service) -> None:
    job = finished_job(service)
    facts = facts_of(service, job)
    facts["configuration"]["base_model"]["id"] = "<script>alert(1)</script>"
    assert "<script>alert(1)" not in WRITERS["html"](facts, None)


def test_a_report_needs_a_committed_task_and_a_known_format(service: Service) -> None:
    finished = finished_job(service, "other")
    job = service.submit("one")
    path = f"/v1/jobs/{job['id']}/report"
    early = service.client.get(path)
    assert (early.status_code, early.json()["code"]) == (404, "no_report")
    wrong = service.client.get(path, params={"format": "pdf"})
    assert wrong.status_code == 422
    assert "html" in wrong.text
    missing = service.client.get(f"/v1/jobs/{finished['id']}/report", params={"baseline": "job_nothing"})
    assert (missing.status_code, missing.json()["detail"]) == (404, "baseline: no job 'job_nothing'")
    own = service.client.get(f"/v1/jobs/{finished['id']}/report", params={"baseline": finished["id"]})
    assert (own.status_code, "is the job itself" in own.json()["detail"]) == (422, True)


def test_clpeft_report_writes_the_format_that_the_file_name_asks_for(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = finished_job(service)
    with serve(service.app) as url:
        monkeypatch.setenv("CLPEFT_URL", url)
        runner = CliRunner()
        for name, start in (("r.html", "<!"), ("r.md", "# Adapter demo"), ("r.json", "{")):
            done = runner.invoke(app, ["report", job["id"], "-o", str(tmp_path / name)])
            assert done.exit_code == 0, done.output
            assert (tmp_path / name).read_text().lower().startswith(start.lower())
        printed = runner.invoke(app, ["report", job["id"]])
        assert printed.output == (tmp_path / "r.md").read_text()
        refused = runner.invoke(app, ["report", job["id"], "-o", str(tmp_path / "r.pdf")])
        assert refused.exit_code == 1
    assert json.loads((tmp_path / "r.json").read_text())["job_id"] == job["id"]


def test_answers_that_were_changed_are_refused(service: Service) -> None:
    job = service.submit("one")
    service.reconciler.tick()
    folder = write_task(
        service.storage, job["runs"][0]["id"], 1, 0, predictions={"one": [1.0, 0.0]}, scores={"one": 0.5}
    )
    service.reconciler.tick()
    path = f"{folder}/predictions/one.jsonl"
    service.storage.write_bytes(path, service.storage.read_bytes(path).replace(b"1.0", b"0.0"))
    answer = service.client.get(f"/v1/jobs/{job['id']}/eval-matrix")
    assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
    assert f"{path} is damaged" in answer.json()["detail"]
