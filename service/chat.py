"""Talk to a served adapter through the OpenAI-compatible endpoint, with the official client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai

from service.client import ApiError, Client


class Conversation:
    """Questions and answers with one adapter. Chat adapters remember the turns; others see one text."""

    def __init__(self, client: Client, model: str, *, max_tokens: int = 128) -> None:
        """Name the adapter as name, name@vN or name@alias. Raises ApiError for one that does not exist."""
        self.model = model
        self._is_chat = is_chat_adapter(client.adapter(model.partition("@")[0]))
        self._max_tokens = max_tokens
        self._turns: list[dict[str, str]] = []
        self._openai = openai.OpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=1)

    def describe(self) -> str:
        """Say how texts reach the model."""
        how = (
            "it was trained on messages"
            if self._is_chat
            else "it was trained on prompts, which go to it unchanged"
        )
        return f"{self.model}: {how}"

    def ask(self, text: str) -> Iterator[str]:
        """Give the answer in pieces as it is generated. Raises ApiError."""
        try:
            yield from self._chat(text) if self._is_chat else self._complete(text)
        except openai.APIError as error:
            said = error.body.get("message") if isinstance(error.body, dict) else None
            raise ApiError(f"{self.model} did not answer: {said or error.message}") from error

    def _chat(self, text: str) -> Iterator[str]:
        self._turns.append({"role": "user", "content": text})
        turns: Any = self._turns  # the client's own union of message types says no more than this
        stream = self._openai.chat.completions.create(
            model=self.model, messages=turns, max_tokens=self._max_tokens, temperature=0, stream=True
        )
        answer = ""
        for chunk in stream:
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if piece:
                answer += piece
                yield piece
        self._turns.append({"role": "assistant", "content": answer})

    def _complete(self, text: str) -> Iterator[str]:
        stream = self._openai.completions.create(
            model=self.model, prompt=text, max_tokens=self._max_tokens, temperature=0, stream=True
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].text:
                yield chunk.choices[0].text


def is_chat_adapter(adapter: dict[str, Any]) -> bool:
    """Was the newest version trained on messages rather than on prompts?"""
    newest = max(adapter["versions"], key=lambda version: version["version"])
    return bool(newest["data_format"] == "chat")
