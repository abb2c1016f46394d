"""Two processes give what one gives."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from clcore.engine import parallel
from tests.clcore import two_ranks
from tests.clcore.tiny import assert_close


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Run two_ranks.main on two processes and return what each found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(two_ranks.main, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return two_ranks.two_tasks(Path(tmp_path_factory.mktemp("alone")))


def test_two_ranks_end_with_the_adapter_of_one_rank_with_ewc_and_replay_and_odd_batches(
    ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    assert_close(ranks[0]["two_tasks"]["adapter"], ranks[1]["two_tasks"]["adapter"], atol=0)
    assert_close(ranks[0]["two_tasks"]["adapter"], alone["adapter"], atol=1e-5)
    assert any(len(step) % 2 for task in alone["mixed"] for step in task)  # a rank did get a blank row


def test_two_ranks_estimate_the_fisher_of_one_rank(
    ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for key in ("importance", "anchor"):
        assert_close(ranks[0]["two_tasks"][key], alone[key], atol=1e-4)
        assert_close(ranks[0]["two_tasks"][key], ranks[1]["two_tasks"][key], atol=0)


def test_two_ranks_estimate_the_rank_1_fishers_of_one_rank_even_if_one_has_no_row(
    ranks: list[dict[str, Any]],
) -> None:
    reference = two_ranks.rank_1_fishers()
    assert len(reference) == 2 * 2 * 4  # methods, a and b, layers
    assert_close(ranks[0]["rank_1_fishers"], ranks[1]["rank_1_fishers"], atol=0)
    assert_close(ranks[0]["rank_1_fishers"], reference, atol=1e-4)


def test_two_ranks_report_the_loss_and_token_counts_of_one_rank(
    ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for rank in ranks:
        assert rank["two_tasks"]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert rank["two_tasks"]["tokens"] == alone["tokens"]
        assert rank["two_tasks"]["version"] == alone["version"] == 2


def test_two_ranks_mix_and_keep_the_rows_of_one_rank(
    ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    assert any(ref.startswith("t0:") for step in alone["mixed"][1] for ref in step)
    for rank in ranks:
        assert rank["two_tasks"]["mixed"] == alone["mixed"]
        assert rank["two_tasks"]["refs"] == alone["refs"]


def test_a_stop_that_only_rank_0_hears_ends_both_at_the_same_step(ranks: list[dict[str, Any]]) -> None:
    assert [rank["stopped_at"] for rank in ranks] == [[2], [2]]


def test_collectives_sum_every_dtype_and_rank_0_speaks_for_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["collectives"]["reduced"] == [[[3.0, 3.0], [3.0, 3.0]], 10.0, [4.0, 4.0, 4.0]]
        assert rank["collectives"]["sums"] == [2.0**53, 1.0]
        assert rank["collectives"]["from_rank0"] == 7


def test_alone_collectives_change_nothing() -> None:
    tensor = torch.ones(2)
    parallel.all_reduce_sum([tensor])
    assert tensor.tolist() == [1, 1]
    assert parallel.sum_over_ranks([3.0]) == [3.0]
    assert (parallel.from_rank0(5), parallel.rank(), parallel.world_size()) == (5, 0, 1)
