"""The `clpeft` command as a user runs it: a real process against a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from service.adapters.storage import dataset_key
from tests.service.control import Service, write_events, write_outcome, write_task

COMMAND = Path(sys.executable).with_name("clpeft")
ROWS = '{"prompt": "q1", "completion": " a"}\n{"prompt": "q2", "completion": " b"}\n'


def clpeft(
    *arguments: str, home: Path, url: str = "", stdin: str = "", columns: str = "120", **settings: str
) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("CLPEFT_")}
    variables |= {"CLPEFT_HOME": str(home), "COLUMNS": columns, "NO_COLOR": "1"}
    variables |= {f"CLPEFT_{name.upper()}": value for name, value in settings.items()}
    if url:
        variables["CLPEFT_URL"] = url
    return subprocess.run(
        [COMMAND, *arguments],
        env=variables,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def url_of(service: Service) -> str:
    return str(service.client.base_url)


def job_file(folder: Path, *, dataset: str = "data/train.jsonl", **changes: object) -> Path:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "train.jsonl").write_text(ROWS)
    job = {
        "name": "tickets",
        "base_model": {"id": "tiny"},
        "tasks": [{"name": "one", "dataset": dataset, "eval_dataset": dataset, "steps": 2}],
        **changes,
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))  # JSON is YAML
    return path


def finish(service: Service, job_id: str) -> None:
    """Let the paper worker train the job's tasks."""
    service.reconciler.tick()
    run = service.job(job_id)["runs"][0]["id"]
    step = {
        "task": "one",
        "task_index": 0,
        "step": 2,
        "num_steps": 2,
        "loss": 0.5,
        "tokens_per_s": 10.0,
        "eta_s": 0,
    }
    events = [
        ("run.started", {"num_workers": 1}),
        ("task.started", {"task": "one", "task_index": 0, "num_steps": 2}),
        ("step", step),
        (
            "task.evaluated",
            {"task": "one", "task_index": 0, "scores": {"one": 0.75}, "base_scores": {"one": 0.0}},
        ),
    ]
    write_events(service.storage, run, 1, 1, events)
    write_task(service.storage, run, 1, 0, scores={"one": 0.75}, base_scores={"one": 0.0})
    write_outcome(service.storage, run, 1, "succeeded")
    service.reconciler.tick()
    assert service.job(job_id)["state"] == "succeeded"


def test_help_names_every_command_and_each_has_a_help_text(tmp_path: Path) -> None:
    commands = [
        "up",
        "down",
        "status",
        "submit",
        "append",
        "watch",
        "jobs",
        "show",
        "matrix",
        "cancel",
        "retry",
        "adapters",
    ]
    commands += ["chat", "model", "demo", "report"]
    shown = clpeft("--help", home=tmp_path)
    assert shown.returncode == 0
    for command in commands:
        assert f" {command} " in shown.stdout
        assert clpeft(command, "--help", home=tmp_path).returncode == 0


def test_submit_uploads_local_files_once_and_sends_their_ids(service: Service, tmp_path: Path) -> None:
    done = clpeft("submit", str(job_file(tmp_path)), home=tmp_path, url=url_of(service))
    assert done.returncode == 0, done.stderr
    assert "uploaded data/train.jsonl: 2 rows" in done.stdout
    [job] = service.client.get("/v1/jobs").json()["data"]
    [dataset] = service.client.get("/v1/datasets").json()["data"]
    assert job["id"] in done.stdout
    task = service.job(job["id"])["tasks"][0]
    assert task["dataset_id"] == task["eval_dataset_id"] == dataset["id"]
    assert service.storage.read_bytes(dataset_key(dataset["id"])).count(b"\n") == 2


def test_general_ability_may_be_measured_on_a_local_file(service: Service, tmp_path: Path) -> None:
    path = job_file(tmp_path, evaluation={"general": "data/train.jsonl"})
    done = clpeft("submit", str(path), home=tmp_path, url=url_of(service))
    assert done.returncode == 0, done.stderr
    [job] = service.client.get("/v1/jobs").json()["data"]
    [dataset] = service.client.get("/v1/datasets").json()["data"]
    assert service.job(job["id"])["spec"]["evaluation"]["general"] == dataset["id"]
    listed = clpeft("jobs", home=tmp_path, url=url_of(service))
    assert job["id"] in listed.stdout  # whole, in 80 columns


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("name: [", "is not YAML"),
        (
            "{name: a, base_model: {id: tiny}, evaluation: {general: none.jsonl}, tasks: []}",
            "evaluation.general: 'none.jsonl' is neither the id of a data set (ds_...) nor a file at",
        ),
        (
            "{name: a, base_model: {id: tiny}, evaluation: {general: 7}, tasks: [{name: a, dataset: ds_1}]}",
            "/evaluation/general",
        ),
        ("- a list", "must hold fields such as 'name:', not list"),
        (
            "{name: a, base_model: {id: tiny}, tasks: [{name: one, dataset: none.jsonl}]}",
            "dataset of task 'one': 'none.jsonl' is neither the id of a data set (ds_...) nor a file at",
        ),
        ("{name: a, base_model: {id: tiny}, tasks: []}", "/tasks"),
        ("{name: a, training: {learning_rate: .nan}}", "only text, finite numbers"),
        ("{name: 2024-01-01}", "put dates in quotes"),
        ("{name: ../a, base_model: {id: tiny}, tasks: [{name: one, dataset: ds_1}]}", "../a"),
    ],
)
def test_a_bad_job_file_is_one_clear_error_and_stores_nothing(
    service: Service, tmp_path: Path, text: str, error: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    before = service.holdings()
    done = clpeft("submit", str(path), home=tmp_path, url=url_of(service))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert error in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert service.holdings() == before


def test_uploads_for_a_refused_job_or_task_are_deleted_again(service: Service, tmp_path: Path) -> None:
    path = job_file(tmp_path, colour="red")
    before = service.holdings()
    done = clpeft("submit", str(path), home=tmp_path, url=url_of(service))
    assert done.returncode == 1
    assert "uploaded data/train.jsonl" in done.stdout
    assert "unknown field 'colour'" in done.stderr
    task = tmp_path / "task.yaml"
    task.write_text("{name: two, dataset: data/train.jsonl}")
    done = clpeft("append", "../../healthz", str(task), home=tmp_path, url=url_of(service))
    assert (done.returncode, "uploaded" in done.stdout) == (1, True)
    assert service.holdings() == before


def test_a_bad_setting_is_one_clear_error(tmp_path: Path) -> None:
    done = clpeft("status", home=tmp_path, port="abc")
    assert done.returncode == 1
    assert done.stderr.startswith("error: setting CLPEFT_PORT: ")
    assert "got 'abc'" in done.stderr


def test_a_refused_data_set_is_named(service: Service, tmp_path: Path) -> None:
    path = job_file(tmp_path)
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "q"}\n')
    done = clpeft("submit", str(path), home=tmp_path, url=url_of(service))
    assert done.returncode == 1
    assert done.stderr.startswith("error: data/train.jsonl: line 1: has no completion")


def test_every_state_of_a_job_can_be_read_in_80_columns(service: Service, tmp_path: Path) -> None:
    job = service.submit("one", name="a-name-that-is-rather-long-but-allowed", adapter="another-long-name")
    service.client.post(f"/v1/jobs/{job['id']}:cancel")
    shown = clpeft("jobs", home=tmp_path, url=url_of(service), columns="80").stdout
    assert job["id"] in shown
    assert " cancelled " in shown
    assert "…" not in shown


def test_a_missing_job_file_is_a_usage_error(service: Service, tmp_path: Path) -> None:
    done = clpeft("submit", "none.yaml", home=tmp_path, url=url_of(service))
    assert done.returncode == 2
    assert "none.yaml" in done.stderr


def test_watch_shows_the_progress_and_then_the_scores(service: Service, tmp_path: Path) -> None:
    job = service.submit("one")
    finish(service, job["id"])
    done = clpeft("watch", job["id"], home=tmp_path, url=url_of(service))
    assert done.returncode == 0, done.stderr
    assert "one: step 2/2  loss 0.500  10 tokens/s" in done.stdout
    assert "version 1 is registered" in done.stdout
    assert "average accuracy" in done.stdout
    assert "0.750" in done.stdout
    assert "\x1b" not in done.stdout, "no control codes outside a terminal"


def test_watching_a_job_that_ends_badly_fails_with_its_reason(service: Service, tmp_path: Path) -> None:
    job = service.submit("one")
    service.reconciler.tick()
    write_outcome(service.storage, service.job(job["id"])["runs"][0]["id"], 1, "failed", "data_error")
    service.reconciler.tick()
    done = clpeft("watch", job["id"], home=tmp_path, url=url_of(service))
    assert done.returncode == 1
    assert f"error: job {job['id']} failed: said failed" in done.stderr


def test_jobs_matrix_adapters_and_cancel_show_what_the_service_has(service: Service, tmp_path: Path) -> None:
    url = url_of(service)
    assert "no jobs yet" in clpeft("jobs", home=tmp_path, url=url).stdout
    assert "no adapters yet" in clpeft("adapters", home=tmp_path, url=url).stdout
    job = service.submit("one", name="first")
    finish(service, job["id"])
    other = service.submit("one", name="second")
    assert "cancelled" in clpeft("cancel", other["id"], home=tmp_path, url=url).stdout
    listed = clpeft("jobs", home=tmp_path, url=url).stdout
    assert listed.index("second") < listed.index("first"), "newest first"
    assert "1/1" in listed
    assert "v1" in clpeft("adapters", home=tmp_path, url=url).stdout
    assert "0.750" in clpeft("matrix", job["id"], home=tmp_path, url=url).stdout


def test_show_says_how_far_a_job_is_and_how_its_attempts_ended(service: Service, tmp_path: Path) -> None:
    job = service.submit("one", "two", name="first")
    service.reconciler.tick()
    run = service.job(job["id"])["runs"][0]["id"]
    write_task(service.storage, run, 1, 0, scores={"one": 0.75}, base_scores={"one": 0.0})
    write_outcome(service.storage, run, 1, "failed", "data_error")
    service.reconciler.tick()
    waiting = service.submit("one", name="second")
    shown = clpeft("show", job["id"], home=tmp_path, url=url_of(service)).stdout
    assert f"job {job['id']} is failed: data_error: said failed" in shown
    assert "adapter first over tiny" in shown
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert rows[:2] == [["one", "committed", "2", "v1"], ["two", "skipped", "2", "-"]]
    assert [rows[2][i] for i in (0, 1, 2, 5)] == ["1", "1", "failed", "said failed"]
    shown = clpeft("show", waiting["id"], home=tmp_path, url=url_of(service)).stdout
    assert "waits for a free place" in shown


def test_append_sends_a_local_file_as_a_new_task(service: Service, tmp_path: Path) -> None:
    job = service.submit("one")
    finish(service, job["id"])
    (tmp_path / "more.jsonl").write_text(ROWS)
    (tmp_path / "task.yaml").write_text("{name: two, dataset: more.jsonl, steps: 2}")
    done = clpeft("append", job["id"], str(tmp_path / "task.yaml"), home=tmp_path, url=url_of(service))
    assert done.returncode == 0, done.stderr
    assert [task["name"] for task in service.job(job["id"])["tasks"]] == ["one", "two"]


def test_appending_to_a_cancelled_job_is_refused(service: Service, tmp_path: Path) -> None:
    job = service.submit("one")
    service.client.post(f"/v1/jobs/{job['id']}:cancel")
    (tmp_path / "task.yaml").write_text(f"{{name: two, dataset: {service.upload()}}}")
    done = clpeft("append", job["id"], str(tmp_path / "task.yaml"), home=tmp_path, url=url_of(service))
    assert (done.returncode, done.stdout) == (1, "")
    assert "a cancelled job takes no tasks" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [("watch", "job_none"), ("show", "job_none"), ("matrix", "job_none"), ("chat", "nobody", "-m", "hi")],
)
def test_what_does_not_exist_is_named(service: Service, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = clpeft(*arguments, home=tmp_path, url=url_of(service))
    assert done.returncode == 1
    assert f"'{arguments[1]}'" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_service_the_user_learns_how_to_start_one(tmp_path: Path) -> None:
    done = clpeft("jobs", home=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip().count("\n") == 0
    assert "clpeft up" in done.stderr
    assert (
        "no service answers at http://127.0.0.1:9"
        in clpeft("jobs", home=tmp_path, url="http://127.0.0.1:9").stderr
    )


def test_down_and_status_say_that_nothing_runs(tmp_path: Path) -> None:
    down = clpeft("down", home=tmp_path)
    assert (down.returncode, down.stdout.strip()) == (0, "nothing runs")
    status = clpeft("status", home=tmp_path)
    assert status.returncode == 1
    assert "nothing runs under" in status.stdout


def test_model_errors_and_list(tmp_path: Path) -> None:
    bad = clpeft("model", "prepare", "gpt-7", home=tmp_path)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert "known are smollm2-135m" in bad.stderr
    assert "clpeft model prepare smollm2-135m" in clpeft("model", "list", home=tmp_path).stdout


def test_a_demo_over_an_unusable_folder_fails_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    done = clpeft("demo", "--tasks", str(tmp_path / "tasks"), home=tmp_path / "home")
    assert done.returncode == 1
    assert textwrap.shorten(done.stderr, 300).startswith("error: no tasks in")
    assert not (tmp_path / "home" / "demo" / "run" / "embedded.json").exists()


def test_db_shows_and_changes_the_schema_and_names_an_unknown_revision(tmp_path: Path) -> None:
    def db(*arguments: str, stdin: str = "") -> str:
        done = clpeft("db", *arguments, home=tmp_path, stdin=stdin)
        return f"{done.returncode} {done.stdout}{done.stderr}"

    assert "0 the database has revision base; this version needs" in db("current")
    assert list(tmp_path.iterdir()) == [], "to look changes nothing"
    assert db("upgrade", "0001") == "0 the database has revision 0001\n"
    newest = db("upgrade").split()[-1]
    assert db("downgrade", "0001", stdin="n\n").startswith("1 ")
    assert f"revision {newest}; this version needs {newest}" in db("current")
    assert db("downgrade", "0001", "--yes") == "0 the database has revision 0001\n"
    assert db("upgrade", "no-such").startswith("1 error: ")
    assert "no-such" in db("upgrade", "no-such")


@pytest.mark.parametrize("command", ["api", "reconciler"])
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://a:secret@b/c", "begins with mysql://; allowed: sqlite://, postgresql://"),
        ("postgresql://a:secret@127.0.0.1:1/c", "the database does not answer: "),
    ],
)
def test_a_process_that_cannot_use_its_database_says_why_in_one_text(
    tmp_path: Path, command: str, url: str, said: str
) -> None:
    done = clpeft(command, home=tmp_path, database_url=url)
    assert (done.returncode, done.stderr[:7]) == (1, "error: ")
    assert said in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_database_and_wrong_settings_are_one_clear_text(tmp_path: Path) -> None:
    (tmp_path / "clpeft.db").write_bytes(b"not a database" * 1000)
    file = tmp_path / "file"
    file.write_text("")
    for done, said in (
        (clpeft("db", "current", home=tmp_path), "the database cannot be used: file is not a database"),
        (clpeft("api", home=tmp_path), "the database cannot be used: file is not a database"),
        (
            clpeft("api", home=tmp_path, storage_url="foo://x"),
            "CLPEFT_STORAGE_URL: foo:// is no storage",
        ),
        (clpeft("status", home=file / "x"), "Not a directory"),
        (clpeft("jobs", home=tmp_path, url="http://[::1"), "'http://[::1' is no address of a service"),
    ):
        assert (done.returncode, done.stderr[:7]) == (1, "error: "), done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
