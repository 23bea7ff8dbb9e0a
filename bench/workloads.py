"""What a benchmark sends: random token ids, or the prompts, conversations or arrivals of a file.

Everything here is a pure function of its arguments: the same seed gives the same requests on any machine, so that two
servers can be asked exactly the same thing.
"""

import itertools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import UserError

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer

CHARS_PER_TOKEN = 4  # of English text; turns a recorded reply into a number of tokens where no tokenizer is at hand
MAX_ROUND_TRIPS = 20  # between text and tokens
MAX_REPLY_TOKENS = 1024
TRACE_BLOCK_SIZE = 512  # tokens that a hash id of a Mooncake trace stands for


@dataclass(frozen=True)
class BenchRequest:
    """One request of a workload. It generates exactly `output_len` tokens: end-of-sequence is ignored."""

    output_len: int
    prompt: list[int] | str = ""  # token ids are sent as they are, so that the input length is exact
    messages: list[dict[str, Any]] | None = None  # instead of a prompt: goes through the chat endpoint
    temperature: float = 0.0
    arrival: float | None = None  # seconds from the start of a trace
    repeat: int = 0  # how often it has been sent before, in a run that goes through its requests again
    then: "BenchRequest | None" = None  # the next turn, without what was said before it: see `next_turn`

    @property
    def text(self) -> str:
        """What is asked, as text; of token ids none."""
        if self.messages is not None:
            return "\n".join(str(message.get("content", "")) for message in self.messages)
        return self.prompt if isinstance(self.prompt, str) else ""

    @property
    def turns(self) -> "list[BenchRequest]":
        return [self, *(self.then.turns if self.then else [])]


@dataclass(frozen=True)
class Answer:
    """What a server generated."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # empty where the server does not tell


def begun(request: BenchRequest, index: int, concurrency: int) -> BenchRequest:
    """One of the first requests of a closed loop, cut so that they end one after the other.

    Else requests of one length would all end together and the next ones come in waves, in each run other ones.
    """
    return replace(request, output_len=max(1, round(request.output_len * (index + 1) / concurrency)))


def next_turn(request: BenchRequest, answer: Answer) -> BenchRequest | None:
    """The turn after a request, with all that was said before in front of it."""
    then = request.then
    if then is None:
        return None
    if request.messages is not None:
        said = [*request.messages, {"role": "assistant", "content": answer.text}, *(then.messages or [])]
        return replace(then, messages=said, repeat=request.repeat)
    if isinstance(request.prompt, str) or isinstance(then.prompt, str):
        return replace(then, prompt=f"{request.prompt}{answer.text}{then.prompt}", repeat=request.repeat)
    # Unknown ids: as many others, which are those of every run.
    ids = answer.token_ids or list(itertools.islice(itertools.cycle(request.prompt), request.output_len))
    return replace(then, prompt=[*request.prompt, *ids, *then.prompt], repeat=request.repeat)


def check_lengths(requests: Sequence[BenchRequest], max_model_len: int | None) -> None:
    """Refuse token prompts that the model has no room for, before a run full of failures. Raises UserError."""
    lengths = [
        sum(len(turn.prompt) + turn.output_len for turn in request.turns)
        for request in requests
        if isinstance(request.prompt, list)
    ]
    if max_model_len and max(lengths, default=0) > max_model_len:
        turns = ", of all turns" if any(request.then for request in requests) else ""
        raise UserError(
            f"a request has {max(lengths):,} tokens (input and output{turns}), the model has room for "
            f"{max_model_len:,}: lower --input-len or --output-len, or raise --max-model-len"
        )


def random_requests(
    num_prompts: int,
    *,
    input_len: int,
    output_len: int,
    vocab_size: int,
    seed: int,
    range_ratio: float = 0.0,
    temperature: float = 0.0,
    prefix_len: int = 0,
    num_prefixes: int = 1,
    turns: int = 1,
) -> list[BenchRequest]:
    """Uniform random token ids; lengths uniform in [len * (1 - range_ratio), len * (1 + range_ratio)].

    Before them come `prefix_len` tokens more, which every num_prefixes-th request has in common. With `turns` each is a
    conversation of so many requests, whose further turns are like the first without the prefix.
    """
    if not 0 <= range_ratio < 1:
        raise UserError(f"--range-ratio must be in [0, 1), got {range_ratio:g}")
    rng = np.random.default_rng(seed)

    def lengths(mean: int) -> list[int]:
        low, high = max(1, int(mean * (1 - range_ratio))), int(mean * (1 + range_ratio))
        return [int(length) for length in rng.integers(low, high + 1, num_prompts)]

    def draw() -> list[BenchRequest]:
        input_lens, output_lens = lengths(input_len), lengths(output_len)
        return [
            BenchRequest(num_output, rng.integers(0, vocab_size, num_input).tolist(), temperature=temperature)
            for num_input, num_output in zip(input_lens, output_lens, strict=True)
        ]

    requests, *later = [draw() for _ in range(turns)]
    conversations = [_conversation(each) for each in zip(requests, *later, strict=True)]
    prefixes = rng.integers(0, vocab_size, (num_prefixes, prefix_len)).tolist()
    return [
        replace(request, prompt=[*prefixes[i % num_prefixes], *request.prompt])
        for i, request in enumerate(conversations)
    ]


def _conversation(turns: Sequence[BenchRequest]) -> BenchRequest:
    first, *later = turns
    return replace(first, then=_conversation(later)) if later else first


def uniform_requests(
    num_prompts: int, *, low: int, high: int, seed: int, temperature: float = 0.0
) -> list[BenchRequest]:
    """Random token ids (up to 10,000), lengths of inputs and outputs uniform in [low, high].

    Drawn as nano-vllm's benchmark draws them: with low 100, high 1024 and seed 0 they are that benchmark's own lengths.
    """
    rng = random.Random(seed)
    prompts = [[rng.randint(0, 10_000) for _ in range(rng.randint(low, high))] for _ in range(num_prompts)]
    return [BenchRequest(rng.randint(low, high), prompt, temperature=temperature) for prompt in prompts]


def file_requests(path: Path, *, output_len: int, seed: int, vocab_size: int, turns: int = 1) -> list[BenchRequest]:
    """What a file holds, in an order drawn from the seed; a trace, whose lines have a timestamp, in its own."""
    if not path.is_file():
        raise UserError(f"--dataset {path}: no such file; give a file, or `random`")
    requests = _Reader(path, output_len, turns, seed, vocab_size).read()
    if not requests:
        raise UserError(f"--dataset {path}: holds no prompt")
    if requests[0].arrival is not None:
        return _in_order_of_arrival(requests, path)
    random.Random(seed).shuffle(requests)
    return requests


def _in_order_of_arrival(requests: list[BenchRequest], path: Path) -> list[BenchRequest]:
    """A trace whose first request comes at once."""
    moments = [request.arrival for request in requests if request.arrival is not None]
    if len(moments) < len(requests):
        raise UserError(f"--dataset {path}: some lines have a timestamp and some have none")
    arrivals = [replace(r, arrival=m - min(moments)) for r, m in zip(requests, moments, strict=True)]
    return sorted(arrivals, key=lambda request: request.arrival or 0.0)


def as_text(requests: list[BenchRequest], tokenizer: "Tokenizer") -> list[BenchRequest]:
    """Requests whose prompts are text, for servers that take no token ids.

    Random token ids seldom come back from their text as they were, so the text is trimmed and lengthened until it makes
    as many tokens as were asked for. A prompt that is text stays as it is.
    """

    def text_of(token_ids: list[int]) -> str:
        kept, rest = token_ids, iter(token_ids)
        for _ in range(MAX_ROUND_TRIPS):
            text = tokenizer.decode(kept)
            found = tokenizer.encode(text)
            if len(found) == len(token_ids):
                break
            kept = found[: len(token_ids)] + list(itertools.islice(rest, max(0, len(token_ids) - len(found))))
        return text

    return [replace(r, prompt=text_of(r.prompt)) if isinstance(r.prompt, list) else r for r in requests]


def warm_up_requests(requests: list[BenchRequest], num_prompts: int, *, output_len: int) -> list[BenchRequest]:
    """Requests like the first ones, their words shuffled: the same work, and no prefix the measured ones could find.

    A chat stays one, so that a server which has none (its model no template) says so before it is measured.
    """
    rng = random.Random(0)

    def shuffled(request: BenchRequest) -> BenchRequest:
        length, temperature = min(output_len, request.output_len), request.temperature
        if isinstance(request.prompt, list):
            return BenchRequest(length, rng.sample(request.prompt, len(request.prompt)), temperature=temperature)
        words = request.text.split()
        text = " ".join(["Warm", "up:", *rng.sample(words, len(words))])
        if request.messages is not None:
            return BenchRequest(length, messages=[{"role": "user", "content": text}], temperature=temperature)
        return BenchRequest(length, text, temperature=temperature)

    return [shuffled(request) for request in requests[:num_prompts]]


@dataclass(frozen=True)
class _Reader:
    """Reads one file: what it holds is told by its extension and by each entry."""

    path: Path
    output_len: int
    turns: int
    seed: int
    vocab_size: int

    def read(self) -> list[BenchRequest]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--dataset {self.path}: is not UTF-8 text ({error})") from None
        if self.path.suffix == ".json":
            entries = _parse_json(text, where=str(self.path))
            if not isinstance(entries, list):
                raise UserError(f"--dataset {self.path}: must be a JSON list of prompts or of ShareGPT conversations")
            return self._read_entries((f"{self.path}, entry {i}", entry) for i, entry in enumerate(entries, 1))
        lines = [(f"{self.path}:{i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        if self.path.suffix == ".jsonl":
            return self._read_entries((where, _parse_json(line, where)) for where, line in lines)
        return [BenchRequest(output_len=self.output_len, prompt=line.strip()) for _, line in lines]

    def _read_entries(self, entries: Iterable[tuple[str, Any]]) -> list[BenchRequest]:
        read = [self._read_entry(entry, where) for where, entry in entries]
        return [request for request in read if request]

    def _read_entry(self, entry: Any, where: str) -> BenchRequest | None:
        """One JSON object as a request; None for a recorded conversation that nobody opens."""
        if isinstance(entry, dict) and isinstance(entry.get("conversations"), list):
            return _read_conversation(entry["conversations"], self.turns)
        if isinstance(entry, dict):
            length = entry.get("output_len", entry.get("output_length", self.output_len))
            milliseconds = entry.get("timestamp")
            is_moment = isinstance(milliseconds, int | float) and milliseconds >= 0
            content = self._read_content(entry, where)
            if isinstance(length, int) and length >= 1 and (is_moment or milliseconds is None) and content:
                return BenchRequest(length, *content, arrival=None if milliseconds is None else milliseconds / 1000)
        raise UserError(
            f'--dataset {where}: needs {{"prompt", "messages" or "input_length": 1 or more, "output_len": 1 or more '
            '(optional), "timestamp": milliseconds (a trace)}'
        )

    def _read_content(self, entry: dict[str, Any], where: str) -> tuple[list[int] | str, list[Any] | None] | None:
        """An entry's prompt and messages."""
        if isinstance(entry.get("messages"), list):
            return "", entry["messages"]
        prompt = entry.get("prompt")
        if (isinstance(prompt, str) and prompt) or (isinstance(prompt, list) and all(type(t) is int for t in prompt)):
            return prompt, None
        length, hash_ids = entry.get("input_length"), entry.get("hash_ids")
        if isinstance(length, int) and length >= 1:
            return self._drawn_prompt(length, hash_ids if isinstance(hash_ids, list) else [where]), None
        return None

    def _drawn_prompt(self, length: int, hash_ids: list[Any]) -> list[int]:
        """A prompt whose length a trace tells and, as Mooncake does, which blocks of 512 tokens others have, too."""
        drawn = [random.Random(f"{self.seed} {each}") for each in [*hash_ids, hash_ids]]
        sizes = [*[TRACE_BLOCK_SIZE] * len(hash_ids), length]  # the last for what no id stands for
        blocks = [rng.choices(range(self.vocab_size), k=k) for rng, k in zip(drawn, sizes, strict=True)]
        return list(itertools.chain.from_iterable(blocks))[:length]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--dataset {where}: is not JSON ({error})") from None


def _read_conversation(turns: list[Any], num_turns: int) -> BenchRequest | None:
    """ShareGPT: the first questions, and as many tokens as each recorded answer has by its number of characters.

    One question alone is a prompt; several are a chat, in which the server's own answers take the recorded ones' place.
    """
    texts = [turn.get("value", "") if isinstance(turn, dict) else "" for turn in turns]
    requests = []
    for question, answer in itertools.islice(zip(texts[::2], texts[1::2], strict=False), num_turns):
        if not (isinstance(question, str) and question and isinstance(answer, str) and answer):
            break
        length = min(MAX_REPLY_TOKENS, max(4, len(answer) // CHARS_PER_TOKEN))
        is_chat = num_turns > 1
        messages = [{"role": "user", "content": question}] if is_chat else None
        requests.append(BenchRequest(length, "" if is_chat else question, messages))
    return _conversation(requests) if requests else None
