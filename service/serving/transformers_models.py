"""What the model thread does: load base models, attach adapters, generate.

One thread owns every model. It generates, and between two tokens it applies changes of modules, so that a
request in flight neither meets a half-changed model nor waits for files.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
from peft import PeftConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from service.serving.engine import Delta, Event, Finished, GenerateRequest, RequestError, ServingError
from service.serving.text import TextStream

T = TypeVar("T")
WEIGHTS = "adapter_model.safetensors"


@dataclass
class Base:
    """A base model; `peft` is the PeftModel around the same modules once an adapter was attached."""

    path: str
    model: Any
    """A PreTrainedModel that generates; transformers types neither half of that."""
    tokenizer: Any
    end_token_ids: frozenset[int]
    context_tokens: int | None
    peft: Any = None


@dataclass(frozen=True)
class Attached:
    """An adapter inside its base. The name is never used again, whatever is loaded later."""

    base: Base
    name: str


class ModelThread:
    """The one thread that touches models."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(1, "models", torch.set_num_threads, (num_threads,))
        self._changes: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()

    async def run(self, work: Callable[[], T]) -> T:
        """Run a generation after those that came before it."""
        return await asyncio.wrap_future(self._pool.submit(work))

    async def change(self, work: Callable[[], T]) -> T:
        """Run a short change of modules soon: between two tokens when a generation is under way."""
        future: Future[T] = Future()
        self._changes.put((future, work))
        self._pool.submit(self.apply_changes)
        return await asyncio.wrap_future(future)

    def apply_changes(self) -> bool:
        """Run the waiting changes; called on the model thread. True if there were any."""
        changed = False
        with suppress(Empty):
            while True:
                future, work = self._changes.get_nowait()
                changed = True
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)
        return changed


def load_base(path: str) -> Base:
    """Load a base model and its tokenizer, safetensors only, in float32 on a CPU and as stored on a GPU.

    Raises ServingError naming the path.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32 if device == "cpu" else "auto",
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise ServingError(f"base model {path!r} does not load: {error}") from error
    model = model.to(device).eval()
    ends = model.generation_config.eos_token_id
    ids = {ends} if isinstance(ends, int) else set(ends or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Base(path, model, tokenizer, frozenset(ids), context)


def attach(base: Base, folder: str, name: str) -> Attached:
    """Add an adapter's weights to its base; on the model thread. Raises ServingError naming what is wrong."""
    if not (Path(folder) / WEIGHTS).is_file():  # PEFT would go on to a pickle
        raise ServingError(f"the adapter has no {WEIGHTS}")
    attached = Attached(base, name)
    try:
        config = PeftConfig.from_pretrained(folder)
        if config.is_prompt_learning:
            raise ValueError("prompt-learning adapters are not served")
        config.inference_mode = True
        if base.peft is None:
            base.peft = get_peft_model(base.model, config, adapter_name=name)
        base.peft.load_adapter(folder, adapter_name=name)  # leaves all modules in eval mode
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if base.peft is not None and name in base.peft.peft_config:
            detach(attached)
        raise ServingError(f"the adapter does not fit base model {base.path!r}: {error}") from error
    return attached


def detach(attached: Attached) -> None:
    """Remove an adapter's weights from its base; on the model thread."""
    peft = attached.base.peft
    if others := [name for name in peft.peft_config if name != attached.name]:
        peft.set_adapter(others[0])  # PEFT warns when it removes the active adapter
    peft.delete_adapter(attached.name)


def encode(base: Base, request: GenerateRequest) -> list[int]:
    """Turn the prompt or the conversation into tokens. Raises RequestError."""
    if request.prompt is not None:
        ids: list[int] = base.tokenizer(request.prompt)["input_ids"]
        if not ids:
            raise RequestError("the prompt has no tokens", "prompt")
        return ids
    assert request.messages is not None
    if base.tokenizer.chat_template is None:
        raise RequestError("this base model has no chat template; use /v1/completions", "model")
    try:
        turns = [message.model_dump() for message in request.messages]
        chat = base.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # templates raise what they like
        raise RequestError(f"the chat template refuses these messages: {error}", "messages") from error
    found: list[int] = chat["input_ids"]
    return found


def token_limit(base: Base, request: GenerateRequest, num_prompt_tokens: int) -> int:
    """Return how many tokens may be generated. Raises RequestError when they do not fit the context."""
    if base.context_tokens is None:
        return request.max_tokens
    left = base.context_tokens - num_prompt_tokens
    if left < 1 or (left < request.max_tokens and not request.cut_max_tokens):
        raise RequestError(
            f"this model's context is {base.context_tokens} tokens, but the prompt has {num_prompt_tokens} "
            f"and max_tokens is {request.max_tokens}; shorten one of them",
            "messages" if request.prompt is None else "prompt",
            "context_length_exceeded",
        )
    return min(left, request.max_tokens)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One generation."""

    base: Base
    adapter: str | None
    ids: list[int]
    limit: int
    request: GenerateRequest
    stop: threading.Event
    """Set when nobody waits for the answer any more."""
    emit: Callable[[Event], None]


def generate(job: Job, thread: ModelThread) -> None:
    """Generate on the model thread, batch of one; emit Deltas and Finished."""
    if job.stop.is_set():
        return
    base, request = job.base, job.request
    _activate(base, job.adapter)
    watcher = _Watcher(job, thread)
    inputs = torch.tensor([job.ids], device=base.model.device)
    output = base.model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=job.limit,
        do_sample=False,  # sampling is a processor here, with a random state of its own
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=sorted(base.end_token_ids) or None,
        pad_token_id=min(base.end_token_ids, default=0),
        logits_processor=_sampling(request, inputs.device),
        stopping_criteria=StoppingCriteriaList([watcher]),
    )
    ids: list[int] = output[0, len(job.ids) :].tolist()
    if rest := watcher.text.end():
        job.emit(Delta(text=rest))
    is_ended = watcher.text.is_stopped or ids[-1] in base.end_token_ids
    job.emit(Finished(finish_reason="stop" if is_ended else "length", token_ids=tuple(ids)))


def _activate(base: Base, adapter: str | None) -> None:
    if base.peft is None:
        return
    if adapter is None:
        base.peft.base_model.disable_adapter_layers()
    else:
        base.peft.base_model.enable_adapter_layers()
        base.peft.set_adapter(adapter)


class _Watcher(StoppingCriteria):
    """Sees every new token: sends its text, applies waiting changes, and says whether to stop."""

    def __init__(self, job: Job, thread: ModelThread) -> None:
        tokenizer = job.base.tokenizer
        self._job = job
        self._thread = thread
        self.text = TextStream(
            lambda ids: str(
                tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            ),
            job.request.stop,
        )

    def __call__(self, input_ids: torch.Tensor, _scores: torch.Tensor, **_: Any) -> torch.Tensor:
        token_id = int(input_ids[0, -1])
        if token_id not in self._job.base.end_token_ids and (delta := self.text.add(token_id)):
            self._job.emit(Delta(text=delta))
        if self._thread.apply_changes():
            _activate(self._job.base, self._job.adapter)
        is_done = self.text.is_stopped or self._job.stop.is_set()
        return torch.full((input_ids.shape[0],), is_done, dtype=torch.bool, device=input_ids.device)


def _sampling(request: GenerateRequest, device: torch.device) -> LogitsProcessorList:
    if request.temperature == 0:
        return LogitsProcessorList()
    generator = torch.Generator(device)
    if request.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.seed)
    return LogitsProcessorList(
        [TemperatureLogitsWarper(request.temperature), TopPLogitsWarper(request.top_p), _Draw(generator)]
    )


class _Draw(LogitsProcessor):
    """Draw the next token and leave only it, so that no other request's random numbers matter."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = torch.multinomial(torch.softmax(scores.float(), dim=-1), 1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)
