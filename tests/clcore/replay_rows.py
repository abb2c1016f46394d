"""Rows for tests of replay, and a strategy whose earlier task had them."""

from __future__ import annotations

from typing import Any

import torch

from clcore.engine.memory import MemorySession
from clcore.engine.params import Params
from clcore.engine.tasks import Example
from clcore.strategies.replay_experience import ExperienceReplay
from tests.clcore.tiny import new_session, tiny_llama


def row(ref: str, length: int) -> Example:
    ids = torch.arange(3, 3 + length)
    return {"input_ids": ids, "labels": ids.clone(), "ref": ref}


def tokens(examples: Any) -> int:
    return sum(len(example["input_ids"]) for example in examples)


def refs(examples: Any) -> list[str]:
    return [example["ref"] for example in examples]


def bound_after(
    stored: list[Example], session: MemorySession | None = None, **params: Any
) -> ExperienceReplay:
    """Return a strategy inside the engine whose earlier task had the stored rows."""
    model = tiny_llama()
    session = session or new_session()
    strategy = ExperienceReplay(model, **params)
    strategy.bind(model, Params.of(model), session)
    strategy.after_training("old", stored)
    session.commit()
    strategy = ExperienceReplay(model, **params)
    strategy.bind(model, Params.of(model), session.next_task(op_id="next"))
    strategy.before_training("new")
    return strategy
