"""What a benchmark sends: random token ids, or the prompts of a file.

Everything here is a pure function of its arguments: the same seed gives the same requests on any machine, so that two
servers can be asked exactly the same thing.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError

CHARS_PER_TOKEN = 4  # of English text; turns a recorded reply into a number of tokens where no tokenizer is at hand
MAX_REPLY_TOKENS = 1024


@dataclass(frozen=True)
class BenchRequest:
    """One request of a workload. It generates exactly `output_len` tokens: end-of-sequence is ignored."""

    output_len: int
    prompt: list[int] | str = ""  # token ids are sent as they are, so that the input length is exact
    messages: list[dict[str, Any]] | None = None  # instead of a prompt: goes through the chat endpoint
    temperature: float = 0.0
    arrival: float | None = None  # seconds from the start of a trace
    repeat: int = 0  # how often it has been sent before, in a run that goes through its requests again


def random_requests(
    num_prompts: int,
    *,
    input_len: int,
    output_len: int,
    vocab_size: int,
    seed: int,
    range_ratio: float = 0.0,
    temperature: float = 0.0,
) -> list[BenchRequest]:
    """Uniform random token ids; lengths uniform in [len * (1 - range_ratio), len * (1 + range_ratio)]."""
    if not 0 <= range_ratio < 1:
        raise UserError(f"--range-ratio must be in [0, 1), got {range_ratio:g}")
    rng = np.random.default_rng(seed)

    def lengths(mean: int) -> list[int]:
        low, high = max(1, int(mean * (1 - range_ratio))), int(mean * (1 + range_ratio))
        return [int(length) for length in rng.integers(low, high + 1, num_prompts)]

    input_lens, output_lens = lengths(input_len), lengths(output_len)
    return [
        BenchRequest(num_output, rng.integers(0, vocab_size, num_input).tolist(), temperature=temperature)
        for num_input, num_output in zip(input_lens, output_lens, strict=True)
    ]


def uniform_requests(
    num_prompts: int, *, low: int, high: int, seed: int, temperature: float = 0.0
) -> list[BenchRequest]:
    """Random token ids (up to 10,000), lengths of inputs and outputs uniform in [low, high].

    Drawn as nano-vllm's benchmark draws them: with low 100, high 1024 and seed 0 they are that benchmark's own lengths.
    """
    rng = random.Random(seed)
    prompts = [[rng.randint(0, 10_000) for _ in range(rng.randint(low, high))] for _ in range(num_prompts)]
    return [BenchRequest(rng.randint(low, high), prompt, temperature=temperature) for prompt in prompts]


def file_requests(path: Path, num_prompts: int, *, output_len: int, seed: int) -> list[BenchRequest]:
    """Prompts of a file in an order drawn from the seed; a file with fewer prompts is gone through again."""
    if not path.is_file():
        raise UserError(f"--dataset {path}: no such file; give a file, or `random`")
    requests = _read_file(path, output_len)
    if not requests:
        raise UserError(f"--dataset {path}: holds no prompt")
    random.Random(seed).shuffle(requests)
    return [requests[i % len(requests)] for i in range(num_prompts)]


def warm_up_requests(requests: list[BenchRequest], num_prompts: int, *, output_len: int) -> list[BenchRequest]:
    """Requests like the first ones, their words shuffled: the same work, and no prefix the measured ones could find."""
    rng = random.Random(0)

    def shuffled(request: BenchRequest) -> BenchRequest:
        if isinstance(request.prompt, list):
            prompt: list[int] | str = rng.sample(request.prompt, len(request.prompt))
        else:
            words = (request.prompt or json.dumps(request.messages)).split()
            prompt = " ".join(["Warm", "up:", *rng.sample(words, len(words))])
        return replace(request, prompt=prompt, messages=None, output_len=min(output_len, request.output_len))

    return [shuffled(request) for request in requests[:num_prompts]]


def _read_file(path: Path, output_len: int) -> list[BenchRequest]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--dataset {path}: is not UTF-8 text ({error})") from None
    if path.suffix == ".json":
        entries = _parse_json(text, where=str(path))
        if not isinstance(entries, list):
            raise UserError(f"--dataset {path}: must be a JSON list of prompts or of ShareGPT conversations")
        parsed = [_read_entry(entry, output_len, f"{path}, entry {i}") for i, entry in enumerate(entries, 1)]
        return [request for request in parsed if request]
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if path.suffix == ".jsonl":
        parsed = [
            _read_entry(_parse_json(line, where=f"{path}:{number}"), output_len, f"{path}:{number}")
            for number, line in lines
        ]
        return [request for request in parsed if request]
    return [BenchRequest(output_len=output_len, prompt=line.strip()) for _, line in lines]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--dataset {where}: is not JSON ({error})") from None


def _read_entry(entry: Any, output_len: int, where: str) -> BenchRequest | None:
    """One JSON object as a request; None for a recorded conversation that nobody opens."""
    if isinstance(entry, dict) and isinstance(entry.get("conversations"), list):
        return _read_conversation(entry["conversations"])
    length = entry.get("output_len", output_len) if isinstance(entry, dict) else None
    if isinstance(length, int) and length >= 1:
        if isinstance(entry.get("messages"), list):
            return BenchRequest(output_len=length, messages=entry["messages"])
        prompt = entry.get("prompt")
        if (isinstance(prompt, str) and prompt) or (isinstance(prompt, list) and all(type(t) is int for t in prompt)):
            return BenchRequest(output_len=length, prompt=prompt)
    raise UserError(f'--dataset {where}: needs {{"prompt" or "messages", "output_len": 1 or more (optional)}}')


def _read_conversation(turns: list[Any]) -> BenchRequest | None:
    """ShareGPT: the first question, and as many tokens as its recorded answer has by its number of characters."""
    texts = [turn.get("value", "") for turn in turns[:2] if isinstance(turn, dict)]
    if len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
        return None
    return BenchRequest(output_len=min(MAX_REPLY_TOKENS, max(4, len(texts[1]) // CHARS_PER_TOKEN)), prompt=texts[0])
