"""The offline front door: prompts in, finished answers out, with the engine in this process.

The same core as behind the server, without messages in between, so a debugger can follow a prompt to its tokens. A call
leaves nothing behind in the engine, also when it is interrupted.
"""

import dataclasses
import difflib
import random
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine.chat_template import render_chat
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.embeddings import check_dimensions, finish_embedding
from engine.errors import InvalidEmbeddingError, UserError
from engine.hub import resolve_model
from engine.intake import make_requests
from engine.messages import TokenOutput
from engine.outputs import Embedding, EmbeddingOutput, RequestOutput, RequestState
from engine.sampling_params import Pooling, SamplingParams, pooling_params
from engine.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any]  # text, {"prompt": text} or {"prompt_token_ids": [...]}
Messages = list[dict[str, Any]]  # a conversation: [{"role": "user", "content": "..."}]


class LLM:
    """A model loaded into this process. The keywords are the fields of EngineConfig, as on the command line."""

    def __init__(self, model: str = "", **flags: Any) -> None:
        self.config = config = make_config(model, flags)
        path = str(resolve_model(config.model, config.revision))
        self.tokenizer = None if config.skip_tokenizer_init else Tokenizer.load(config.tokenizer or path)
        self.core = EngineCore(dataclasses.replace(config, model=path))
        self._seeds = random.Random(self.config.seed)
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete the prompts; results in their order. One set of parameters for all, or one for each."""
        prompts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        texts, token_ids = self._tokenize(prompts)
        return self._run(texts, token_ids, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, by the model's chat template or the one given."""
        if self.tokenizer is None:
            raise UserError(
                "chat needs the tokenizer, and skip_tokenizer_init left it out: use generate with token ids"
            )
        template = chat_template or self.tokenizer.chat_template
        if template is None:
            raise UserError(f"{self.config.model} has no chat template: pass chat_template, or use generate")
        is_single = not messages or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if is_single else messages
        texts = [
            render_chat(
                template,
                conversation,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.tokenizer.bos_token,
                eos_token=self.tokenizer.eos_token,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        token_ids = self.tokenizer.encode_batch(texts, add_special_tokens=False)  # the template wrote them
        return self._run(texts, token_ids, sampling_params, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingOutput]:
        """The prompts as vectors, in their order.

        pooling: "last" is the hidden state of the last token, "mean" the mean over all of them; None: as the model was
        trained. normalize: to length 1. dimensions: the first so many numbers alone.
        """
        prompts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        texts, token_ids = self._tokenize(prompts)
        ready = self.core.ready
        check_dimensions(dimensions, ready.hidden_size)
        results = self._run(texts, token_ids, pooling_params(pooling or ready.default_pooling), use_tqdm)
        outputs = []
        for result in results:
            if result.embedding is None:
                raise InvalidEmbeddingError
            vector = finish_embedding(result.embedding, dimensions=dimensions, normalize=normalize)
            outputs.append(
                EmbeddingOutput(
                    request_id=result.request_id,
                    prompt=result.prompt,
                    prompt_token_ids=result.prompt_token_ids,
                    outputs=Embedding(vector.tolist()),
                    num_cached_tokens=result.num_cached_tokens,
                    metrics=result.metrics,
                )
            )
        return outputs

    def _tokenize(self, prompts: Sequence[Prompt]) -> tuple[list[str | None], list[list[int]]]:
        """Each prompt's text, if it has one, and its token ids."""
        texts, token_ids = zip(*map(_read_prompt, prompts), strict=True) if prompts else ((), ())
        to_encode = [text for text, ids in zip(texts, token_ids, strict=True) if ids is None]
        if to_encode and self.tokenizer is None:
            raise UserError('skip_tokenizer_init left the tokenizer out: pass {"prompt_token_ids": [...]}')
        encoded = iter(self.tokenizer.encode_batch(to_encode) if self.tokenizer else [])
        return list(texts), [next(encoded) if ids is None else ids for ids in token_ids]

    def _run(
        self,
        texts: Sequence[str | None],
        token_ids: list[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        shows_progress: bool,
    ) -> list[RequestOutput]:
        params = _one_each(sampling_params, len(texts), self.core.ready.default_sampling)
        states = [self._make_state(*each) for each in zip(texts, token_ids, params, strict=True)]
        running = {
            sequence.request.request_id: (state, sequence.index) for state in states for sequence in state.sequences
        }
        try:
            with _ProgressBar(states, shows_progress) as progress, _InterruptBetweenSteps() as interrupt:
                for state in states:
                    for sequence in state.sequences:
                        self.core.add(sequence.request)
                while running:
                    interrupt.check()
                    self._take(self.core.step(), running)
                    progress.update()
        finally:
            self.core.abort(list(running))  # only after an interrupt or an error is there any
        return [state.result() for state in states]

    def _make_state(self, text: str | None, token_ids: list[int], params: SamplingParams) -> RequestState:
        if params.grammar:
            self.core.worker.grammars.compile(params.grammar)
        request_id = str(self._num_requests)
        self._num_requests += 1
        requests = make_requests(
            request_id,
            token_ids,
            params,
            ready=self.core.ready,
            tokenizer=self.tokenizer,
            seeds=self._seeds,
        )
        return RequestState(request_id, text, requests, self.tokenizer)

    def _take(self, outputs: list[TokenOutput], running: dict[str, tuple[RequestState, int]]) -> None:
        now = time.monotonic()
        for output in outputs:
            if output.request_id not in running:
                continue  # stopped by its text while another token was on the way
            state, index = running[output.request_id]
            delta = state.take(index, output, now)
            if delta.finish_reason is not None:
                del running[output.request_id]
                if output.finish_reason is None:  # a stop string: the engine knows nothing of text
                    self.core.abort([output.request_id])


def make_config(model: str, flags: dict[str, Any]) -> EngineConfig:
    """EngineConfig from keywords. An unknown name or value raises TypeError or ValueError with what would be right."""
    hints = get_type_hints(EngineConfig)
    for name, value in flags.items():
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(hints)}"
            raise TypeError(f"LLM has no parameter {name!r}: {hint}")
        if get_origin(hints[name]) is Literal and value not in get_args(hints[name]):
            raise ValueError(f"{name} must be one of {', '.join(get_args(hints[name]))}, got {value!r}")
    return EngineConfig(**{"model": model, **flags})


def _read_prompt(prompt: Prompt) -> tuple[str | None, list[int] | None]:
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
        return prompt.get("prompt"), list(prompt["prompt_token_ids"])
    if isinstance(prompt, Mapping) and isinstance(prompt.get("prompt"), str):
        return prompt["prompt"], None
    raise TypeError(f'a prompt is a string, {{"prompt": ...}} or {{"prompt_token_ids": [...]}}, got {prompt!r}')


def _one_each(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int, defaults: dict[str, Any]
) -> list[SamplingParams]:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams(**defaults)] * num_prompts
    if len(sampling_params) != num_prompts:
        raise ValueError(f"{len(sampling_params)} sampling_params for {num_prompts} prompts: give one, or one for each")
    return list(sampling_params)


class _InterruptBetweenSteps:
    """Ctrl-C waits for the step to end, so that the engine is whole afterwards; a second one does not wait."""

    def __init__(self) -> None:
        self._is_interrupted = False

    def check(self) -> None:
        if self._is_interrupted:
            raise KeyboardInterrupt

    def __enter__(self) -> "_InterruptBetweenSteps":
        self._is_main_thread = threading.current_thread() is threading.main_thread()
        if self._is_main_thread:
            self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_main_thread:
            signal.signal(signal.SIGINT, self._previous)

    def _interrupt(self, *_: object) -> None:
        self.check()
        self._is_interrupted = True


class _ProgressBar:
    """Finished requests and token rates, on stderr, ten times a second."""

    def __init__(self, states: list[RequestState], is_shown: bool) -> None:
        self._states = states
        self._start = self._last_shown = time.monotonic()
        self._progress = Progress(
            TextColumn("generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("requests {task.fields[rates]}"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not is_shown,
        )
        self._task = self._progress.add_task("", total=len(states), rates="")

    def __enter__(self) -> "_ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._show(time.monotonic())
        self._progress.stop()

    def update(self) -> None:
        now = time.monotonic()
        if now - self._last_shown > 0.1:
            self._show(now)

    def _show(self, now: float) -> None:
        self._last_shown = now
        started = [state.timings for state in self._states if state.timings.last_token_time]
        prompt_rate = sum(timings.num_prompt_tokens for timings in started) / (now - self._start)
        output_rate = sum(timings.num_output_tokens for timings in started) / (now - self._start)
        num_finished = sum(state.is_finished for state in self._states)
        rates = f"{prompt_rate:,.0f} tok/s in, {output_rate:,.0f} tok/s out"
        self._progress.update(self._task, completed=num_finished, rates=rates)
