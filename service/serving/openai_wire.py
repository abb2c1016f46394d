"""OpenAI's request and response bodies, as far as one greedy or sampled answer goes.

What cannot be done here is refused by its type: a field takes only the value that asks for nothing.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from service.serving.directory import ServedModel
from service.serving.engine import ChatMessage, GenerateRequest
from service.specs import Spec

COMPLETION_MAX_TOKENS = 16
CHAT_MAX_TOKENS = 128
MAX_STOPS = 4

Stop = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    """Extras of a stream."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    include_usage: bool = False


class _Generation(Spec):
    """Fields of both routes. Null means the default, as OpenAI has it; what changes no token is ignored."""

    model: str = Field(min_length=1, max_length=400)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None

    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("frequency_penalty", "presence_penalty", mode="before")
    @classmethod
    def _zero(cls, value: Any) -> Any:
        return 0 if value == 0 else value

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _generate_request(
        self, model: ServedModel, limit: int | None, default: int, **given: Any
    ) -> GenerateRequest:
        return GenerateRequest(
            base_model_path=model.base_model_path,
            adapter=model.adapter,
            max_tokens=default if limit is None else limit,
            cut_max_tokens=limit is None,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(self.stop or ()),
            **given,
        )


class CompletionRequest(_Generation):
    """Body of POST /v1/completions: the prompt goes to the model as it is."""

    prompt: str
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if isinstance(value, list):
            if len(value) != 1 or not isinstance(value[0], str):
                raise ValueError(
                    "give one text prompt per request; several prompts or token ids are not taken"
                )
            return value[0]
        return value

    def to_engine(self, model: ServedModel) -> GenerateRequest:
        """Return what the engine is asked."""
        return self._generate_request(model, self.max_tokens, COMPLETION_MAX_TOKENS, prompt=self.prompt)


class TextPart(BaseModel):
    """One part of a message's content; only text can be read."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. The chat template decides which roles it knows."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(BaseModel):
    """The only response format."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["text"]


class ChatRequest(_Generation):
    """Body of POST /v1/chat/completions: the base model's chat template makes the prompt."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None
    top_logprobs: None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None

    def to_engine(self, model: ServedModel) -> GenerateRequest:
        """Return what the engine is asked."""
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        messages = tuple(
            ChatMessage(role="system" if turn.role == "developer" else turn.role, content=turn.text)
            for turn in self.messages
        )
        return self._generate_request(model, limit, CHAT_MAX_TOKENS, messages=messages)


class Answer:
    """Builds the bodies of one answer; `is_chat` decides the shape."""

    def __init__(self, model_id: str, *, is_chat: bool) -> None:
        self._is_chat = is_chat
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_id,
        }

    def whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        if self._is_chat:
            choice: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            choice = {"text": text}
        choice |= {"index": 0, "logprobs": None, "finish_reason": finish_reason}
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": usage}

    def first_chunk(self) -> dict[str, Any] | None:
        """Return the chunk before any text; completions have none."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}) if self._is_chat else None

    def text_chunk(self, text: str) -> dict[str, Any]:
        """Return a chunk with new text."""
        return self._chunk({"delta": {"content": text}} if self._is_chat else {"text": text})

    def last_chunk(self, finish_reason: str) -> dict[str, Any]:
        """Return the chunk after all text."""
        return self._chunk({"delta": {}} if self._is_chat else {"text": ""}, finish_reason)

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """Return the chunk that stream_options.include_usage asks for."""
        return {**self._chunk({}), "choices": [], "usage": usage}

    def _chunk(self, choice: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        choice = {"index": 0, **choice, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": kind, "choices": [choice]}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return OpenAI's token counts; the end token counts as generated."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
