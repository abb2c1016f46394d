"""Data sets over HTTP: what is taken, what is refused, and that a refusal leaves nothing behind."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.adapters.storage import Storage, dataset_key, outputs_key, plan_key
from service.datasets import UploadLimit, store_rows
from tests.service.control import NDJSON, Service, wait_until

ROW = b'{"prompt": "2+2?", "completion": " 4"}'


def send(service: Service, content: Any, name: str = "rows", **options: Any) -> httpx.Response:
    """Upload content as it is."""
    return service.client.post(
        "/v1/datasets", **{"params": {"name": name}, "content": content, "headers": NDJSON, **options}
    )


def test_upload_stores_canonical_rows_with_size_and_checksum(service: Service) -> None:
    answer = send(service, b'{ "completion":" \\u00e9", "prompt": "p" }\n' + ROW)
    shown = answer.json()
    stored = service.storage.read_bytes(dataset_key(shown["id"]))
    assert answer.status_code == 201
    assert stored == '{"prompt":"p","completion":" é"}\n{"prompt":"2+2?","completion":" 4"}\n'.encode()
    assert (shown["num_rows"], shown["bytes"], shown["format"]) == (2, len(stored), "completion")
    assert shown["sha256"] == hashlib.sha256(stored).hexdigest()
    assert shown["statistics"]["prompt_chars"] == {"total": 5, "max": 4, "mean": 2.5}
    assert service.client.get(f"/v1/datasets/{shown['id']}").json() == shown


@pytest.mark.parametrize(
    "content",
    [
        ROW + b"\r\n" + ROW + b"\r\n",
        b"\xef\xbb\xbf" + ROW + b"\n" + ROW,
        ROW + b"\n" + ROW + b"\n\n",
        ROW + b"\n \n" + ROW,
    ],
    ids=["crlf", "byte-order-mark", "blank-last-line", "blank-line-between"],
)
def test_line_ends_marks_and_blank_lines_do_not_matter(service: Service, content: bytes) -> None:
    assert send(service, content).json()["num_rows"] == 2


def test_a_row_cut_at_any_byte_between_two_pieces_is_read_whole(service: Service) -> None:
    content = '{"prompt":"é","completion":" ü"}\r\n'.encode() * 2

    def bytewise() -> Iterator[bytes]:
        for i in range(len(content)):
            yield content[i : i + 1]

    assert send(service, bytewise()).json()["num_rows"] == 2


def test_messages_are_a_format_of_their_own(service: Service) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    shown = send(service, json.dumps(row)).json()
    assert shown["format"] == "messages"
    assert shown["statistics"]["completion_chars"]["total"] == 5


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "a", "completion": ', "malformed JSON"),
        (b"[" * 1500, "malformed JSON"),
        (b'{"prompt": "a"}', "no completion"),
        (b'{"completion": "a"}', "no prompt"),
        (b'{"prompt": "a", "completion": "  "}', "completion is empty"),
        (b'{"prompt": "a", "completion": 4}', "must be text, got int"),
        (b'{"prompt": "a", "completion": "b", "label": 1}', "unknown field 'label'"),
        (b'["a", "b"]', "must be an object, got list"),
        (b'{"messages": []}', "at least one message"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "last message must be the assistant's"),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', "'robot'; allowed: system, user"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "one format"),
        (b'{"messages": [], "prompt": "a"}', "not both"),
        (b'{"prompt": "\\ud800", "completion": "b"}', "surrogate"),
        (b'{"prompt": "\xff", "completion": "b"}', "not UTF-8"),
        (b'{"prompt": "' + b"a" * 3000 + b'", "completion": "b"}', "more than 2000 bytes"),
    ],
)
def test_a_bad_row_is_named_by_its_line_and_nothing_is_kept(service: Service, line: bytes, says: str) -> None:
    before = service.holdings()
    answer = send(service, ROW + b"\n" + line + b"\n" + ROW)
    body = answer.json()
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert body["code"] == "invalid_rows"
    assert body["errors"][0]["pointer"] == "/lines/2"
    assert says in body["errors"][0]["detail"]
    assert "line 2" in body["detail"]
    assert service.holdings() == before


def test_up_to_100_bad_rows_are_reported_at_once(service: Service) -> None:
    body = send(service, b"{}\n" * 150).json()
    assert [error["pointer"] for error in body["errors"]] == [f"/lines/{i}" for i in range(1, 101)]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_data_set_is_refused(service: Service, content: bytes) -> None:
    before = service.holdings()
    answer = send(service, content)
    assert answer.status_code == 422
    assert "empty" in answer.json()["detail"]
    assert service.holdings() == before


def test_an_upload_over_the_limit_is_413_and_leaves_nothing(service: Service) -> None:
    before = service.holdings()
    too_much = (ROW + b"\n") * 4000

    def in_pieces() -> Iterator[bytes]:  # no Content-Length
        for i in range(0, len(too_much), 10_000):
            yield too_much[i : i + 10_000]

    for content in (too_much, in_pieces()):
        answer = send(service, content)
        assert answer.status_code == 413
        assert "100000 bytes" in answer.json()["detail"] or "at most 100000" in answer.json()["detail"]
    assert service.holdings() == before


def test_an_upload_that_breaks_off_leaves_nothing(service: Service) -> None:
    before = service.holdings()

    def breaks() -> Iterator[bytes]:
        yield ROW + b"\n"
        wait_until(lambda: service.holdings() != before, "the server to open its file")
        raise InterruptedError

    with pytest.raises(InterruptedError):
        send(service, breaks())
    wait_until(lambda: service.holdings() == before, "the server to notice")


@pytest.mark.parametrize("name", ["../x", "a/b", "", "A", "x" * 64])
def test_a_bad_name_is_refused(service: Service, name: str) -> None:
    before = service.holdings()
    answer = send(service, ROW, name=name)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/name"
    assert service.holdings() == before


def test_an_upload_is_never_held_in_memory(tmp_path: Path) -> None:
    piece = (ROW + b"\n") * 1000  # 37 kB
    num_pieces = 100

    async def upload() -> AsyncIterator[bytes]:
        for _ in range(num_pieces):
            yield piece

    storage = Storage(f"file://{tmp_path}")
    limits: dict[str, Any] = {"limit": UploadLimit(10**9, "at most 1 GB"), "max_row_bytes": 10**6}
    tracemalloc.start()
    stored = asyncio.run(store_rows(upload(), storage=storage, dataset_id="ds_1", **limits))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert stored.num_rows == 1000 * num_pieces
    assert stored.bytes > 3 * 2**20
    assert peak_bytes < 2**20


def test_another_media_type_is_415(service: Service) -> None:
    answer = send(service, ROW, headers={"Content-Type": "text/csv"})
    assert answer.status_code == 415
    assert "application/x-ndjson" in answer.json()["detail"]


def test_data_sets_are_listed_in_pages_newest_first(service: Service) -> None:
    ids = [service.upload(f"set{i}") for i in range(3)]
    first = service.client.get("/v1/datasets", params={"limit": 2}).json()
    rest = service.client.get("/v1/datasets", params={"limit": 2, "after": first["next_cursor"]}).json()
    assert [row["id"] for row in first["data"] + rest["data"]] == ids[::-1]
    assert (first["has_more"], rest["has_more"], rest["next_cursor"]) == (True, False, None)


def test_a_data_set_is_deleted_unless_a_job_uses_it(service: Service) -> None:
    used = service.submit("one")["tasks"][0]["dataset_id"]
    free = service.upload("free")
    assert service.client.delete(f"/v1/datasets/{free}").status_code == 204
    assert not service.storage.exists(dataset_key(free))
    assert service.client.get(f"/v1/datasets/{free}").status_code == 404
    refused = service.client.delete(f"/v1/datasets/{used}")
    assert refused.status_code == 409
    assert service.storage.exists(dataset_key(used))


def test_what_models_answered_goes_with_the_data_set(service: Service) -> None:
    dataset = service.upload("free")
    answers = f"{outputs_key(dataset)}/{'a' * 64}/x.json"
    service.storage.write_bytes(answers, b"{}")
    assert service.client.delete(f"/v1/datasets/{dataset}").status_code == 204
    assert not service.storage.exists(answers)


def test_a_job_may_measure_general_ability_on_a_data_set_which_then_stays(service: Service) -> None:
    general = service.upload("general")
    job = service.submit("one", evaluation={"general": general})
    refused = service.client.delete(f"/v1/datasets/{general}")
    assert (refused.status_code, refused.json()["code"]) == (409, "dataset_in_use")
    service.reconciler.tick()
    planned = service.storage.read_json(plan_key(job["runs"][0]["id"]))["general_dataset"]
    assert (planned["id"], planned["num_rows"]) == (general, 10)


def test_an_unknown_general_set_is_refused_before_anything_is_stored(service: Service) -> None:
    body = service.job_body("one", evaluation={"general": "ds_nothing"})
    before = service.holdings()
    refused = service.client.post("/v1/jobs", json=body)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == "/evaluation/general"
    assert "'ds_nothing'" in refused.json()["detail"]
    assert service.holdings() == before
