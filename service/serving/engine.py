"""What an engine does: one request in, a stream of events out.

The same types travel as JSON between the gateway and a replica: the request as one object, the events as
lines.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator


class ServingError(RuntimeError):
    """Serving cannot work now: no cluster, no proxy, a model that does not load."""


class RequestError(ValueError):
    """The request itself is wrong; names the parameter and a short code."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AdapterRef(_Wire):
    """One immutable adapter version."""

    id: str = Field(min_length=1, max_length=200)
    """name@vN, for people; the files decide."""
    task_dir: str = Field(min_length=1, max_length=500)
    """Storage key of the task directory; adapter/ below it holds PEFT's files."""


class ChatMessage(_Wire):
    """One turn of a conversation."""

    role: str = Field(min_length=1, max_length=32)
    content: str


class GenerateRequest(_Wire):
    """One prompt for one adapter, or for the base model alone; prompt or messages, exactly one of them."""

    base_model_path: str = Field(min_length=1)
    adapter: AdapterRef | None = None
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    max_tokens: int = Field(ge=1)
    cut_max_tokens: bool = False
    """Take what the context leaves instead of refusing; for defaults that the user did not choose."""
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    """0 takes the most likely token."""
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_input(self) -> GenerateRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, not both")
        return self


class Started(_Wire):
    """The first event: the prompt is accepted and the models are loaded."""

    type: Literal["started"] = "started"
    prompt_tokens: int


class Delta(_Wire):
    """New text; joined, the deltas are the whole answer."""

    type: Literal["delta"] = "delta"
    text: str


class Finished(_Wire):
    """The last event."""

    type: Literal["finished"] = "finished"
    finish_reason: Literal["stop", "length"]
    token_ids: tuple[int, ...]
    """Every token that was generated, the end token included."""


class Failed(_Wire):
    """The last event after an error; the text so far is not the whole answer."""

    type: Literal["failed"] = "failed"
    message: str


Event = Annotated[Started | Delta | Finished | Failed, Field(discriminator="type")]


class _Line(RootModel[Event]):
    pass


def parse_event(line: str) -> Event:
    """Read an event from its JSON line."""
    return _Line.model_validate_json(line).root


class EngineStatus(_Wire):
    """What a replica holds now."""

    engine: str
    base_models: tuple[str, ...]
    adapters: tuple[str, ...]
    leases: int
    """Requests that hold an adapter or base model now."""
    generations: int
    """Generations that were started since the replica is up."""


class Engine(Protocol):
    """Generates text. Closing the generator early stops the generation."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield Started, Deltas, Finished. Raises RequestError or ServingError before Started only."""
        ...

    def status(self) -> EngineStatus: ...
