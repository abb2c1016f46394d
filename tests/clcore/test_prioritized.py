"""Prioritised replay: how likely a row comes back, what its loss weighs, and where priorities come from.

Long, because the probabilities, the weights and their flow through the loop belong together.
"""

from __future__ import annotations

import itertools
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from clcore.engine import parallel
from clcore.engine.errors import ConfigError, DataError
from clcore.engine.loss import RowLosses, completion_nll
from clcore.engine.memory import InProcessMemory, MemorySession
from clcore.engine.params import Params
from clcore.engine.registry import make_config
from clcore.engine.strategy import compose
from clcore.engine.tasks import Example, collate
from clcore.strategies.ewc_synaptic import SynapticIntelligence
from clcore.strategies.replay_prioritized import PrioritizedExperienceReplay
from clcore.strategies.replay_quality import QualityController
from tests.clcore.fitting import fit
from tests.clcore.replay_rows import refs, row
from tests.clcore.tiny import assert_close, mean_nll, new_session, tiny_dataset, tiny_llama, trainable


def with_priorities(priorities: list[float], length: int = 4, **params: Any) -> PrioritizedExperienceReplay:
    """Return a strategy inside the engine that stores rows old:0, old:1, ... with these priorities."""
    model, session = tiny_llama(), new_session()
    strategy = PrioritizedExperienceReplay(model, replay_frequency=1, **params)
    strategy.bind(model, Params.of(model), session)
    strategy.after_training("old", [row(f"old:{i}", length) for i in range(len(priorities))])
    session.commit()
    strategy = PrioritizedExperienceReplay(model, replay_frequency=1, **params)
    strategy.bind(model, Params.of(model), session.next_task(op_id="next"))
    strategy.before_training("new")
    order = [int(ref.split(":")[1]) for ref in refs(strategy.stored)]
    strategy.update_priorities(range(len(priorities)), [priorities[i] for i in order])
    return strategy


def by_number(strategy: PrioritizedExperienceReplay, values: np.ndarray) -> list[float]:
    """Sort values per stored row by the row's number."""
    pairs = zip(refs(strategy.stored), values.tolist(), strict=True)
    return [value for _, value in sorted(pairs, key=lambda pair: int(pair[0].split(":")[1]))]


def position(strategy: PrioritizedExperienceReplay, number: int) -> int:
    return refs(strategy.stored).index(f"old:{number}")


# ---------------------------------------------------------------------------------- probabilities, weights


def test_probabilities_are_capped_powers_mixed_with_uniform() -> None:
    replay = with_priorities([1.0, 4.0, 9.0, 100.0], alpha=0.5, uniform_mix=0.1, priority_cap=0.75)
    # The 0.75 quantile of 4 rows is the third, 9. Roots 1, 2, 3, 3 of 9; 0.9 * root / 9 + 0.1 / 4.
    expected = [0.125, 0.225, 0.325, 0.325]
    assert by_number(replay, replay.probabilities()) == pytest.approx(expected, rel=1e-5)


def test_weights_are_inverse_powers_of_n_times_p_with_the_largest_of_the_step_at_1() -> None:
    replay = with_priorities([1.0, 4.0, 9.0, 100.0], alpha=0.5, beta=0.5, priority_cap=0.75)
    # N p = 0.5, 0.9, 1.3, 1.3. Of rows 1 and 2: 0.9^-0.5 = 1.0541, 1.3^-0.5 = 0.8771; ratio 0.8321.
    assert replay.importance_weights([position(replay, 2), position(replay, 1)]) == pytest.approx(
        [0.8321, 1.0], abs=1e-4
    )
    assert replay.importance_weights([position(replay, i) for i in (0, 3)]) == pytest.approx(
        [1.0, (0.5 / 1.3) ** 0.5], rel=1e-5
    )


def test_alpha_0_is_uniform_and_one_row_of_garbage_counts_as_the_worst_good_one() -> None:
    uniform = with_priorities([0.1, 1.0, 50.0], alpha=0.0)
    assert uniform.probabilities() == pytest.approx([1 / 3] * 3)
    garbage = with_priorities([0.5 + i / 100 for i in range(20)] + [1000.0])
    p = by_number(garbage, garbage.probabilities())
    assert p[20] == pytest.approx(p[19])
    assert p[20] < 0.07


def test_beta_grows_to_1_over_the_replay_steps_of_all_tasks() -> None:
    replay = with_priorities([1.0, 2.0], beta=0.4, beta_annealing_steps=10)
    betas = []
    for step in range(3):
        betas.append(replay.beta)
        replay.mix_batch([row("new:0", 12)], step=step)
    assert betas == pytest.approx([0.4, 0.46, 0.52])
    replay.after_training("new", [row("new:0", 12)])
    assert replay.metrics()["beta"] == pytest.approx(0.58)
    replay.memory.commit()
    later = PrioritizedExperienceReplay(replay.model, replay_frequency=1, beta_annealing_steps=10)
    later.bind(replay.model, replay.params, replay.memory.next_task(op_id="later"))
    later.before_training("later")
    assert later.beta == pytest.approx(0.58)
    later.load_state_dict({"replay_steps": 100})
    assert later.beta == 1
    assert with_priorities([1.0], beta=0.4, beta_annealing=False).beta == 0.4


# -------------------------------------------------------------------------------------------------- drawing


def test_first_and_second_draws_follow_the_probabilities_without_replacement() -> None:
    replay = with_priorities([0.1, 0.5, 1.0, 3.0], alpha=1.0, priority_cap=1.0)
    p, num_draws = replay.probabilities(), 4000
    pairs: Counter[tuple[int, ...]] = Counter()
    for seed in range(num_draws):
        pairs[tuple(itertools.islice(replay.draw(np.random.default_rng(seed)), 2))] += 1
    assert len(pairs) == 12
    statistic = 0.0
    for (first, second), count in pairs.items():
        expected = num_draws * p[first] * p[second] / (1 - p[first])
        statistic += (count - expected) ** 2 / expected
    assert statistic < 31.3  # 99.9 % of chi-square with 11 degrees of freedom


def test_a_draw_brings_every_row_once_before_any_comes_again_and_none_of_the_batch() -> None:
    replay = with_priorities([10.0 ** (i % 7 - 3) for i in range(40)], uniform_mix=0.0, priority_cap=1.0)
    draws = list(itertools.islice(replay.draw(np.random.default_rng(0)), 80))
    assert sorted(draws[:40]) == sorted(draws[40:]) == list(range(40))
    batch = [row("old:3", 400), row("new:0", 400)]
    mixed = replay.mix_batch(batch, step=0)
    assert "old:3" not in refs(mixed)[2:]
    assert len(set(refs(mixed)[2:])) == 39
    alone = with_priorities([1.0])
    assert refs(alone.mix_batch([row("old:0", 40)], step=0)) == ["old:0"]


# ---------------------------------------------------------------------------------------- the weighted loss


def losses_of(strategy: PrioritizedExperienceReplay, examples: list[Example]) -> RowLosses:
    nll, labels = completion_nll(strategy.model, collate(examples, 0))
    return RowLosses(nll, labels, [e.get("ref") for e in examples], 0.01)


def test_only_the_loss_of_replayed_rows_is_weighted() -> None:
    replay = with_priorities([0.1, 1.0, 5.0], beta=1.0, priority_cap=1.0)
    mixed = replay.mix_batch([row("new:0", 12), row("new:1", 14)], step=0)
    assert len(mixed) == 5
    outputs = losses_of(replay, mixed)
    weights = torch.tensor(
        [1.0, 1.0, *replay.importance_weights([refs(replay.stored).index(r) for r in refs(mixed)[2:]])]
    ).float()
    assert weights.min() < 0.5
    loss = replay.modify_loss(outputs.row_nll.sum() * 0.01, outputs=outputs)
    torch.testing.assert_close(loss, (weights * outputs.row_nll).sum() * 0.01)
    (gradient,) = torch.autograd.grad(loss, [outputs.row_nll])
    torch.testing.assert_close(gradient, weights * 0.01)


def test_a_step_without_replay_keeps_its_loss_even_for_a_row_that_was_replayed_before() -> None:
    replay = with_priorities([0.1, 5.0], beta=1.0, replay_ratio=0.5, priority_cap=1.0)
    mixed = replay.mix_batch([row("new:0", 8)], step=0)
    assert len(mixed) == 3
    assert min(replay._weight_of.values()) < 0.5
    replay.replay = type(replay.replay)(replay_frequency=2)
    batch = replay.mix_batch([row("old:0", 4), row("old:1", 4)], step=1)
    outputs = losses_of(replay, batch)
    loss = outputs.row_nll.sum()
    assert replay.modify_loss(loss, outputs=outputs) is loss
    assert replay.modify_loss(loss) is loss


# ---------------------------------------------------------------------------- where priorities come from


def nll_per_label(model: torch.nn.Module, example: Example) -> float:
    return mean_nll(model, [example])


def test_priorities_are_nats_per_label_token_of_the_last_step_that_trained_on_the_row() -> None:
    model, session = tiny_llama(with_b=True), new_session()
    old, new = tiny_dataset("t0", 8), tiny_dataset("t1", 8, shift=5)
    # A rate this small leaves the model as it is, so every step sees the losses of now.
    still: dict[str, Any] = {"learning_rate": 1e-12, "micro_batch_size": 3}
    first = PrioritizedExperienceReplay(model)
    fit(model, old, first, memory=session, num_steps=1, batch_size=6, **still)
    state = session.read("prioritized_replay")
    loss_of = dict(zip(state["refs"], state["losses"], strict=True))
    assert sorted(loss_of) == sorted(refs(old))
    assert sum(loss is None for loss in loss_of.values()) == 2  # 6 of 8 rows were trained on
    for example in old:
        if loss_of[example["ref"]] is not None:
            assert loss_of[example["ref"]] == pytest.approx(nll_per_label(model, example), rel=1e-4)

    second = PrioritizedExperienceReplay(model, replay_frequency=1)
    session = session.next_task(op_id="run/t1")
    second.bind(model, Params.of(model), session)
    highest = max(loss for loss in loss_of.values() if loss is not None)
    for stored, priority in zip(second.stored, second.priorities.tolist(), strict=True):
        known = loss_of[stored["ref"]]
        assert priority == (highest if known is None else known)

    second = PrioritizedExperienceReplay(model, replay_ratio=0.7, replay_frequency=1)
    fit(model, new, second, memory=session, task_id="t1", num_steps=4, batch_size=4, **still)
    state = session.read("prioritized_replay")
    assert state["replay_steps"] == 4
    every = {example["ref"]: example for example in [*old, *new]}
    assert sorted(state["refs"]) == sorted(every)
    for ref, loss in zip(state["refs"], state["losses"], strict=True):
        assert loss == pytest.approx(nll_per_label(model, every[ref]), rel=1e-4)


def test_a_replayed_rows_new_loss_changes_its_chance_in_the_next_step_and_survives_a_state_round_trip() -> (
    None
):
    replay = with_priorities([1.0, 1.0, 1.0, 1.0], priority_cap=1.0)
    mixed = replay.mix_batch([row("new:0", 6), row("new:1", 4)], step=0)
    (drawn,) = refs(mixed)[2:]
    refs_of_rows = [*refs(mixed), None]
    # The second row has no label, the last one is a blank one.
    nll, labels = torch.tensor([7.0, 0.0, 8.0, 0.0]), torch.tensor([3, 0, 2, 0])
    replay.modify_loss(nll.sum(), outputs=RowLosses(nll, labels, refs_of_rows, 1.0))
    assert replay.probabilities() == pytest.approx([0.25] * 4)
    replay.modify_update(replay.params, {})
    assert replay.priorities[refs(replay.stored).index(drawn)] == 4.0  # 8 nats over 2 labels
    assert replay.probabilities().max() > 0.4
    assert replay.state_dict()["losses"]["new:0"] == pytest.approx(7 / 3)
    assert "new:1" not in replay.state_dict()["losses"]
    other = PrioritizedExperienceReplay(replay.model, replay_frequency=1)
    other.load_state_dict(replay.state_dict())
    other.bind(replay.model, replay.params, replay.memory)
    assert other.priorities.tolist() == replay.priorities.tolist()
    replay.after_training("new", [row("new:0", 10)])
    assert replay.state_dict()["losses"] == {}
    assert replay.state_dict()["replay_steps"] == 0


def test_alone_the_mixed_data_set_carries_weights_and_losses_are_written_back_at_once() -> None:
    model = tiny_llama(with_b=True)
    replay = PrioritizedExperienceReplay(model, beta=1.0, replay_frequency=1, priority_cap=1.0)
    replay.after_training("t0", tiny_dataset("t0", 12))
    replay.get_replay_batch(3)
    replay.update_priorities(replay.last_indices, [5.0, 6.0, 7.0])
    assert sorted(replay.priorities.tolist())[-3:] == [5.0, 6.0, 7.0]
    mixed = replay.before_training("t1", tiny_dataset("t1", 12, shift=4))
    examples = [mixed[i] for i in range(len(mixed))]
    outputs = losses_of(replay, examples)
    loss = replay.modify_loss(outputs.row_nll.sum() * 0.01, outputs=outputs)
    weights = torch.tensor([replay._weight_of.get(ref, 1.0) for ref in refs(examples)])
    assert (weights[:12] == 1).all()
    assert weights[12:].min() < 1
    torch.testing.assert_close(loss, (weights * outputs.row_nll).sum() * 0.01)
    per_token = dict(zip(refs(examples), (outputs.row_nll / outputs.num_labels).tolist(), strict=True))
    for i in replay.last_indices:
        assert replay.priorities[i] == pytest.approx(per_token[replay.stored[i]["ref"]])
    replay.after_training("t1", mixed)
    state = replay.memory.read("prioritized_replay")
    kept = dict(zip(state["refs"], state["losses"], strict=True))
    assert kept["t1:3"] == pytest.approx(per_token["t1:3"])
    replay.after_training("t2", tiny_dataset("t2", 2))  # trained on by nobody: what is known stays known
    state = replay.memory.read("prioritized_replay")
    assert dict(zip(state["refs"], state["losses"], strict=True)) == {**kept, "t2:0": None, "t2:1": None}


def test_importance_scores_shape_the_share_that_ignores_priorities() -> None:
    replay = with_priorities([1.0, 1.0], sampling_strategy="importance", uniform_mix=0.5)
    assert replay.probabilities() == pytest.approx([0.5, 0.5])
    replay.update_importance_scores("old", [0], [3.0])
    assert by_number(replay, replay.probabilities()) == pytest.approx([0.625, 0.375])  # (0.5 + 0.75) / 2


def test_in_a_job_bad_rows_are_refused_by_default() -> None:
    assert make_config("prioritized_replay", {}).quality_filter
    assert isinstance(
        PrioritizedExperienceReplay(tiny_llama(), quality_filter=True).quality, QualityController
    )


def test_bad_values_are_refused_by_name() -> None:
    for params, said in [
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"beta": float("nan")}, r"beta must be in \[0, 1\], got nan"),
        ({"uniform_mix": -0.1}, r"uniform_mix must be in \[0, 1\], got -0.1"),
        ({"priority_cap": 0.0}, r"priority_cap must be in \(0, 1\], got 0.0"),
        ({"beta_annealing_steps": 0}, "beta_annealing_steps must be at least 1, got 0"),
        ({"buffer_size": 0}, "buffer_size must be at least 1, got 0"),
    ]:
        with pytest.raises(ConfigError, match=said):
            PrioritizedExperienceReplay(tiny_llama(), **params)  # type: ignore[arg-type]
    replay = with_priorities([1.0, 2.0])
    with pytest.raises(DataError, match=r"stored rows are 0 \.\. 1, got 2"):
        replay.update_priorities([2], [1.0])
    with pytest.raises(DataError, match="1 indices and 2 priorities"):
        replay.update_priorities([0], [1.0, 2.0])
    with pytest.raises(DataError, match=r"priorities must be positive and finite, got 0\.0"):
        replay.update_priorities([0], [0.0])


# ----------------------------------------------------------------------------------------------- two ranks


def two_tasks(folder: Path) -> dict[str, Any]:
    """Train two tasks with SI and prioritised replay; 5 new rows a step leave a rank a blank row at times."""
    datasets = [tiny_dataset("t0", 11), tiny_dataset("t1", 7, shift=5)]
    rows = {example["ref"]: example for dataset in datasets for example in dataset}
    model, session = tiny_llama(with_b=True), new_session()
    mixed: list[list[str]] = []
    for i, dataset in enumerate(datasets):
        replay = PrioritizedExperienceReplay(model, 8, replay_frequency=1, replay_ratio=0.4)
        plain_mix = replay.mix_batch

        def watch(batch: list[Example], *, step: int, plain_mix: Any = plain_mix) -> list[Example]:
            found: list[Example] = plain_mix(batch, step=step)
            mixed.append(refs(found))
            return found

        replay.mix_batch = watch  # type: ignore[method-assign]
        strategy = compose([SynapticIntelligence(model, xi=1e-3), replay])
        fit(
            model,
            dataset,
            strategy,
            task_id=f"t{i}",
            memory=session,
            learning_rate=3e-3,
            batch_size=5,
            micro_batch_size=2,
        )
        # The ranks share one store in the service; here rank 1 reads rank 0's snapshot.
        if parallel.rank() == 0:
            session.store.snapshot(session.version, folder / str(i))
        if parallel.world_size() > 1:
            dist.barrier()
        store = InProcessMemory(load_row=rows.__getitem__)
        version = store.restore(folder / str(i))
        session = MemorySession(store, version=version, op_id=f"run/t{i + 1}", seed=0)
    si, state = session.read("si"), session.read("prioritized_replay")
    return {
        "adapter": trainable(model),
        "mixed": mixed,
        "own": dict(zip(refs(replay.stored), replay.priorities.tolist(), strict=True)),
        "kept": (state["refs"], state["tasks"]),
        "losses": state["losses"],
        "importance": {name: torch.tensor(value) for name, value in si["importance"].items()},
    }


def on_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(two_tasks(Path(folder)), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_draw_store_and_learn_what_one_does_with_si_beside(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(on_rank, args=(port, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = two_tasks(tmp_path / "alone")
    assert any(len(step) % 2 for step in alone["mixed"])  # a rank did get a blank row
    assert any(ref.startswith("t0:") for step in alone["mixed"][5:] for ref in step)
    assert ranks[0]["own"] == ranks[1]["own"]
    for rank in ranks:
        assert rank["mixed"] == alone["mixed"]
        assert rank["kept"] == alone["kept"]
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert_close(rank["adapter"], alone["adapter"], atol=1e-5)
    scale = max(float(f.max()) for f in alone["importance"].values())
    for name, value in alone["importance"].items():
        close: Tensor = (ranks[0]["importance"][name] - value).abs().max() / scale
        assert close < 1e-3
