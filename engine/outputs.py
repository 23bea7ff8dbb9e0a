"""What comes out of a request: pieces of a stream (`OutputDelta`) and the whole (`RequestOutput`).

`RequestState` is the one place where the engine's tokens turn into them, for both front doors. It holds all there is
to know about a request in flight (prompt, parameters, what it has given so far), so dropping it forgets the request.
"""

from dataclasses import dataclass, field

import msgspec

from engine.detokenizer import Detokenizer
from engine.errors import GrammarFailedError, InvalidEmbeddingError, InvalidLogitsError, RequestFailedError
from engine.messages import AddRequest, TokenLogprob, TokenOutput
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer

PromptLogprobs = list[TokenLogprob | None]  # one for each prompt token; the first has none


@dataclass(slots=True)
class OutputDelta:
    """What one sequence of a request gained."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None  # as in TokenOutput
    stop_reason: int | str | None = None  # the stop token or stop string that ended it; None for the model's own end
    num_cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None  # once, with the first tokens
    embedding: bytes | None = None  # instead of tokens, as in TokenOutput


@dataclass(slots=True)
class RequestTimings:
    """When things happened to a request, by time.monotonic(), and how much it was; 0 means not yet."""

    arrival_time: float
    num_prompt_tokens: int
    scheduled_time: float = 0.0
    first_token_time: float = 0.0
    last_token_time: float = 0.0  # or of the embedding, which has no token
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)  # one for each sequence that has ended
    request_id: str = ""


@dataclass(slots=True)
class CompletionOutput:
    """One sequence of a request, as far as it got."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    cumulative_logprob: float | None  # where logprobs were asked for
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(slots=True)
class RequestOutput:
    """A request with all of its sequences."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    metrics: RequestTimings
    embedding: bytes | None = None  # of a request that pools its prompt's hidden states, as in TokenOutput


@dataclass(slots=True)
class Embedding:
    """A prompt as a vector."""

    embedding: list[float]


@dataclass(slots=True)
class EmbeddingOutput:
    """A prompt and its vector, under the names that vLLM gives them."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: Embedding
    num_cached_tokens: int
    metrics: RequestTimings


class SequenceState:
    """One of a request's n sequences: its tokens, and their text."""

    def __init__(self, index: int, request: AddRequest, tokenizer: Tokenizer | None) -> None:
        params = request.params
        self.index = index
        self.request = request
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.embedding: bytes | None = None
        self._texts: list[str] = []
        self._detokenizer = _detokenizer(tokenizer, params) if tokenizer and params.detokenize else None

    def take(self, output: TokenOutput) -> OutputDelta:
        """Take in new tokens. What comes after a stop string is dropped."""
        token_ids, finish_reason = output.token_ids, output.finish_reason
        self.stop_reason, self.embedding = output.stop_reason, output.embedding
        prompt_logprobs = None if self.token_ids else output.prompt_logprobs  # preempted, it has them computed again
        text = ""
        if self._detokenizer is not None:
            text = self._add_text(token_ids, finish_reason, ends_in_text=output.ends_in_text)
            if (stop := self._detokenizer.stop_string) is not None:
                token_ids = token_ids[: self._detokenizer.num_tokens - len(self.token_ids)]
                finish_reason, self.stop_reason = "stop", stop
        logprobs = None if output.logprobs is None else output.logprobs[: len(token_ids)]
        self.finish_reason = finish_reason
        self.token_ids += token_ids
        self.logprobs += logprobs or []
        self._texts.append(text)
        return OutputDelta(
            index=self.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=self.stop_reason,
            prompt_logprobs=prompt_logprobs,
            embedding=output.embedding,
        )

    def failure(self, output: TokenOutput) -> RequestFailedError:
        """What it means that the output ends the sequence with an error."""
        if output.error:
            return GrammarFailedError(len(self.token_ids), output.error)
        return InvalidEmbeddingError() if self.request.params.pooling else InvalidLogitsError(len(self.token_ids))

    def unfinished_request(self) -> AddRequest:
        """What makes another engine go on where this sequence is."""
        params = self.request.params
        if self.token_ids:  # the prompt's log probabilities came with the first one
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        return msgspec.structs.replace(self.request, params=params, output_token_ids=self.token_ids)

    def result(self) -> CompletionOutput:
        has_logprobs = self.request.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text="".join(self._texts),
            token_ids=self.token_ids,
            logprobs=self.logprobs if has_logprobs else None,
            cumulative_logprob=sum(token.logprob for token in self.logprobs) if has_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _add_text(self, token_ids: list[int], finish_reason: str | None, *, ends_in_text: bool) -> str:
        assert self._detokenizer is not None
        # A token that ends the sequence (eos or a stop token) is no part of the text, unless asked for.
        has_end = finish_reason == "stop" and not (ends_in_text or self.request.params.include_stop_str_in_output)
        text = self._detokenizer.add(token_ids[:-1] if has_end else token_ids)
        return text + self._detokenizer.finish() if finish_reason else text


class RequestState:
    """A request in flight."""

    def __init__(
        self, request_id: str, prompt: str | None, requests: list[AddRequest], tokenizer: Tokenizer | None
    ) -> None:
        first = requests[0]
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_logprobs: PromptLogprobs | None = None
        self.sequences = [SequenceState(index, request, tokenizer) for index, request in enumerate(requests)]
        self.timings = RequestTimings(
            first.arrival_time, num_prompt_tokens=len(first.prompt_token_ids), request_id=request_id
        )
        self.num_crashes = 0  # engines that ended while they ran it, see quarantine.py
        self.num_tokens_at_start = 0  # that it had given when the engine at hand got it
        self.num_trial_tokens = 0  # that it will have given when its trial is over

    @property
    def is_finished(self) -> bool:
        return len(self.timings.finish_reasons) == len(self.sequences)

    def take(self, index: int, output: TokenOutput, now: float) -> OutputDelta:
        """Take in new tokens of one sequence, seen at `now`."""
        sequence = self.sequences[index]
        if index == 0 and not sequence.token_ids:  # the others find the first one's blocks: that is no cache hit
            self.timings.num_cached_tokens = output.num_cached_tokens
            self.prompt_logprobs = output.prompt_logprobs
        delta = sequence.take(output)
        delta.num_cached_tokens = self.timings.num_cached_tokens
        self._note(delta, output, now)
        return delta

    def result(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.sequences[0].request.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[sequence.result() for sequence in self.sequences],
            finished=self.is_finished,
            num_cached_tokens=self.timings.num_cached_tokens,
            metrics=self.timings,
            embedding=self.sequences[0].embedding,
        )

    def rename(self) -> None:
        """Give the sequences other ids: tokens that are on their way under the old ones are nobody's."""
        for sequence in self.sequences:
            request = sequence.request
            leader_id = request.leader_id and request.leader_id + "+"
            sequence.request = msgspec.structs.replace(
                request, request_id=request.request_id + "+", leader_id=leader_id
            )

    def _note(self, delta: OutputDelta, output: TokenOutput, now: float) -> None:
        timings = self.timings
        timings.scheduled_time = timings.scheduled_time or output.scheduled_time
        if delta.token_ids:
            timings.first_token_time = timings.first_token_time or now
            timings.last_token_time = now
            timings.num_output_tokens += len(delta.token_ids)
        if delta.embedding is not None:
            timings.last_token_time = now
        if delta.finish_reason is not None:
            timings.finish_reasons.append(delta.finish_reason)


def _detokenizer(tokenizer: Tokenizer, params: SamplingParams) -> Detokenizer:
    return Detokenizer(
        tokenizer.pieces,
        skip_special_tokens=params.skip_special_tokens,
        stop=params.stop,
        include_stop_str=params.include_stop_str_in_output,
        min_tokens=params.min_tokens,
    )
