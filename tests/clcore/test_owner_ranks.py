"""Strategies that own the adapter do on two processes what they do on one."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from tests.clcore import owner_ranks
from tests.clcore.owners import share_inside
from tests.clcore.tiny import assert_close


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Run owner_ranks.main on two processes and return what each found."""
    folder = tmp_path_factory.mktemp("owner_ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(owner_ranks.main, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", owner_ranks.CASES)
def test_two_ranks_end_with_the_adapter_and_the_bases_of_one(
    case: str, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    alone = owner_ranks.two_tasks(case, tmp_path)
    assert_close(ranks[0][case]["adapter"], ranks[1][case]["adapter"])
    assert_close(ranks[0][case]["adapter"], alone["adapter"], atol=2e-5)
    assert ranks[0][case]["ranks"] == ranks[1][case]["ranks"] == alone["ranks"]
    assert set(ranks[0][case]["bases"]) == set(alone["bases"])
    for name, basis in alone["bases"].items():
        found = ranks[0][case]["bases"][name]
        assert found.shape == basis.shape
        assert 1 - share_inside(found, basis) < 1e-4  # the same span; vectors inside it may differ
