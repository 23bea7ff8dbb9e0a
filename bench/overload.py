"""A server at many times the rate that it can sustain: what every client is answered, and what is still got done.

    python -m bench.overload [MODEL] --duration 60 --output FILE.json [-- flags of vcli serve]

First as many clients as the server runs at once ask one after the other (closed loop): what they get done is the
sustainable rate, and how long an answer takes then, times a factor, is the deadline of every later request. Then come
Poisson arrivals at multiples of that rate, whatever comes back. Half of the requests are streams. Invariant: every
request ends in exactly one of `OUTCOMES`.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import psutil

from bench import command
from bench.run_async import run_async
from bench.server import running_server
from engine.errors import UserError
from engine.hub import resolve_model

OUTCOMES = {
    "completed": "a whole answer, of the tokens asked for, within its deadline",
    "refused": "429 or 503, with a Retry-After",
    "cut": "a stream that had begun, and was ended by its deadline",
    "wrong": "anything else",
}
NUM_PROMPTS = 4
HEALTH_PERIOD_S = 0.1
MEMORY_PERIOD_S = 0.25
ON_THE_WAY_S = 0.25  # from a deadline until the answer is here
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Plan:
    """num_users: of the closed loop. deadline_factor: of the time that an answer takes in it. Lengths in tokens.

    Answers are of output_len tokens at most and of half as many at least, so that they do not all end at once.
    """

    num_users: int = 16
    duration_s: float = 60.0  # at each rate
    rates: tuple[float, ...] = (1.0, 10.0)  # times the sustainable one
    deadline_factor: float = 3.0
    input_len: int = 64
    output_len: int = 32


@dataclass
class Record:
    """One request: when it was sent and answered, by time.perf_counter(), and how."""

    sent: float
    ended: float
    outcome: str
    status: int
    is_as_alone: bool  # has the tokens that its prompt gets from a server without load
    what: str  # that was wrong

    @property
    def took_s(self) -> float:
        return self.ended - self.sent


@dataclass
class Client:
    """Sends requests, and knows what is right."""

    session: aiohttp.ClientSession
    url: str
    plan: Plan
    alone: list[list[int]] = field(default_factory=list)  # by prompt: its tokens from a server without load
    num_sent: int = 0

    async def learn(self) -> None:
        """Ask each prompt alone."""
        for number in range(NUM_PROMPTS):
            self.num_sent = number
            status, _, text = await self._post(stream=False, length=self.plan.output_len)
            tokens, error = _tokens_of(text, stream=False) if status == 200 else ([], text)
            if error:
                raise UserError(f"a server without load fails: HTTP {status}: {error[:300]}")
            self.alone.append(tokens)

    async def send(self, deadline_s: float | None) -> Record:
        number, stream, sent = self.num_sent % NUM_PROMPTS, self.num_sent % 2 == 1, time.perf_counter()
        length, status, tokens = self._length(self.num_sent), 0, list[int]()
        try:
            status, headers, text = await self._post(stream, length, deadline_s)
            tokens, error = _tokens_of(text, stream) if status == 200 else ([], text)
            if status in (429, 503) and int(headers.get("Retry-After", "0")) > 0:
                outcome, error = "refused", ""
            elif "deadline_exceeded" in error:
                outcome, error = "cut", ""
            else:
                error = error or ("" if len(tokens) == length else f"{len(tokens)} tokens")
                outcome = "wrong" if error else "completed"
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, LookupError) as caught:
            outcome, error = "wrong", f"{type(caught).__name__}: {caught}"
        ended = time.perf_counter()
        if outcome == "completed" and deadline_s is not None and ended - sent > deadline_s + ON_THE_WAY_S:
            outcome, error = "wrong", f"an answer after {ended - sent:.2f} s, and a deadline of {deadline_s:.2f} s"
        is_as_alone = tokens == self.alone[number][:length]
        return Record(sent, ended, outcome, status, is_as_alone, error and f"HTTP {status}: {error}")

    def _length(self, index: int) -> int:
        """Of a request's answer."""
        return self.plan.output_len - 7 * index % (self.plan.output_len // 2 + 1)

    async def _post(self, stream: bool, length: int, deadline_s: float | None = None) -> tuple[int, Any, str]:
        index, self.num_sent = self.num_sent, self.num_sent + 1
        body = {
            "prompt": [3 + (7 * (index % NUM_PROMPTS) + 3 * i) % 190 for i in range(self.plan.input_len)],
            "max_tokens": length,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": stream,
            "cache_salt": str(index),  # so that nothing is found in the prefix cache
        }
        headers = {} if deadline_s is None else {"X-Request-Deadline-Ms": str(round(1000 * deadline_s))}
        async with self.session.post(f"{self.url}/v1/completions", json=body, headers=headers) as response:
            return response.status, response.headers, await response.text()


def _tokens_of(text: str, stream: bool) -> tuple[list[int], str]:
    """The tokens of a reply with status 200, and the error in it."""
    if not stream:
        return msgspec.json.decode(text)["choices"][0]["token_ids"], ""
    payloads = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
    events = [msgspec.json.decode(payload) for payload in payloads if payload != "[DONE]"]
    errors = [json.dumps(event["error"]) for event in events if "error" in event]
    if not errors and "[DONE]" not in payloads:
        errors = ["the stream broke off"]
    choices = [choice for event in events for choice in event.get("choices", [])]
    return [token for choice in choices for token in choice.get("token_ids") or []], "".join(errors)


async def measure(url: str, plan: Plan, on_phase: Callable[[dict[str, Any]], None] = lambda row: None) -> list[Any]:
    """The closed loop, then each rate: a row of figures for each."""
    connections = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connections, timeout=timeout) as session:
        client = Client(session, url, plan)
        await client.learn()
        rows = [await _phase(client, "closed loop", None, _closed_loop(client))]
        on_phase(rows[0])
        rate, deadline_s = rows[0]["goodput"], plan.deadline_factor * rows[0]["answer_p50_ms"] / 1000
        for times in plan.rates:
            load = _open_loop(client, times * rate, deadline_s)
            rows.append(await _phase(client, f"{times:g} x", deadline_s, load))
            on_phase(rows[-1])
    return rows


async def _closed_loop(client: Client) -> list[Record]:
    records: list[Record] = []
    end = time.perf_counter() + client.plan.duration_s

    async def user() -> None:
        while time.perf_counter() < end:
            records.append(await client.send(None))

    async with asyncio.TaskGroup() as group:
        for _ in range(client.plan.num_users):
            group.create_task(user())
    return records


async def _open_loop(client: Client, rate: float, deadline_s: float) -> list[Record]:
    """Poisson arrivals, whatever comes back."""
    draw, due = random.Random(0), time.perf_counter()
    end = due + client.plan.duration_s
    tasks: list[asyncio.Task[Record]] = []
    while (due := due + draw.expovariate(rate)) < end:
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(client.send(deadline_s)))
    return list(await asyncio.gather(*tasks))


async def _phase(
    client: Client, name: str, deadline_s: float | None, load: Coroutine[Any, Any, list[Record]]
) -> dict[str, Any]:
    start = time.perf_counter()
    async with _watching(client) as (health, memory):
        records = await load
    # The beginning, when the queue fills, does not count, nor does the end, when it empties.
    last = max(record.sent for record in records)
    first = start + min(max(deadline_s or 0.0, 0.1 * client.plan.duration_s), 0.5 * (last - start))
    counts = Counter(record.outcome for record in records)
    done = [record for record in records if record.outcome == "completed"]
    refused = [record for record in records if record.outcome == "refused"]
    return {
        "load": name,
        "deadline_ms": None if deadline_s is None else round(1000 * deadline_s),
        "requests": len(records),
        "rate": len(records) / client.plan.duration_s,
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        "statuses": dict(sorted(Counter(str(record.status) for record in records).items())),
        "as_alone": sum(record.is_as_alone for record in done),
        "goodput": sum(first <= record.ended < last for record in done) / (last - first),
        **_percentiles("answer", [record.took_s for record in done]),
        **_percentiles("refusal", [record.took_s for record in refused]),
        **_percentiles("health", health),
        "memory_mb": _growth(memory),
        "examples": sorted({record.what for record in records if record.what})[:5],
    }


def _percentiles(name: str, seconds: list[float]) -> dict[str, float | None]:
    values = 1000 * np.percentile(seconds, [50, 99, 100]) if seconds else [None] * 3
    return {f"{name}_{part}_ms": value for part, value in zip(("p50", "p99", "max"), values, strict=True)}


def _growth(memory: list[float]) -> dict[str, float]:
    """Resident memory of the server's processes: at the start, and the means of the second and the last third."""
    third = max(len(memory) // 3, 1)
    return {
        "start": memory[0],
        "middle": sum(memory[third : 2 * third] or memory) / len(memory[third : 2 * third] or memory),
        "end": sum(memory[-third:]) / third,
    }


@asynccontextmanager
async def _watching(client: Client) -> AsyncIterator[tuple[list[float], list[float]]]:
    """What /health took while the block ran (s), and what the server's processes held (MB)."""
    health, memory = list[float](), [_server_mb()]

    async def ask() -> None:
        while True:
            start = time.perf_counter()
            async with client.session.get(f"{client.url}/health") as response:
                await response.read()
            health.append(time.perf_counter() - start if response.status == 200 else TIMEOUT_S)
            await asyncio.sleep(HEALTH_PERIOD_S)

    async def weigh() -> None:
        while True:
            await asyncio.sleep(MEMORY_PERIOD_S)
            memory.append(_server_mb())

    tasks = [asyncio.create_task(ask()), asyncio.create_task(weigh())]
    try:
        yield health, memory
    finally:
        for task in tasks:
            task.cancel()


def _server_mb() -> float:
    """Resident memory of this process's children, which are the server's."""
    return sum(child.memory_info().rss for child in psutil.Process().children(recursive=True)) / 2**20


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What an overload must not do."""
    worst, best = rows[-1], max(row["goodput"] for row in rows)
    found = [f"{row['load']}: {row['wrong']} wrong answers, such as {row['examples']}" for row in rows if row["wrong"]]
    if worst["goodput"] < 0.9 * best:
        found.append(f"goodput falls from {best:.2f} to {worst['goodput']:.2f} requests/s at {worst['load']}")
    if not worst["refused"] or worst["refusal_p50_ms"] > 50:
        found.append(f"half of the refusals take more than 50 ms ({worst['refusal_p50_ms']} ms) at {worst['load']}")
    if worst["health_p99_ms"] > 50:
        found.append(f"/health takes {worst['health_p99_ms']:.0f} ms (p99) at {worst['load']}")
    if (memory := worst["memory_mb"])["end"] > 1.05 * memory["middle"]:
        found.append(f"memory grows from {memory['middle']:.0f} to {memory['end']:.0f} MB at {worst['load']}")
    return found


def print_row(row: dict[str, Any]) -> None:
    counts = ", ".join(f"{row[outcome]} {outcome}" for outcome in OUTCOMES if row[outcome])
    refusals = f"refusals {row['refusal_p50_ms']:.1f} ms, " if row["refused"] else ""
    print(
        f"{row['load']:>12}: {row['rate']:.1f} requests/s: {counts}; goodput {row['goodput']:.2f}/s, "
        f"answers {row['answer_p50_ms'] or 0:.0f} ms (p99 {row['answer_p99_ms'] or 0:.0f}), {refusals}"
        f"/health p99 {row['health_p99_ms']:.1f} ms (longest {row['health_max_ms']:.0f}), "
        f"{row['memory_mb']['middle']:.0f} -> {row['memory_mb']['end']:.0f} MB",
        flush=True,
    )


def main(arguments: list[str]) -> int:
    parser = command.parser("overload", __doc__)
    parser.add_argument("--duration", type=float, default=Plan.duration_s, help="seconds at each rate")
    parser.add_argument("--max-num-seqs", type=int, default=Plan.num_users, help="of the server, and clients at first")
    parser.add_argument("--rates", type=float, nargs="+", default=Plan.rates, help="times the sustainable one")
    parser.add_argument("--input-len", type=int, default=Plan.input_len)
    parser.add_argument("--output-len", type=int, default=Plan.output_len)
    options, served = command.parse(parser, arguments)
    plan = Plan(
        num_users=options.max_num_seqs,
        duration_s=options.duration,
        rates=tuple(options.rates),
        input_len=options.input_len,
        output_len=options.output_len,
    )

    def measured() -> tuple[dict[str, Any], bool]:
        model = options.model or Path(resolve_model("")).stem
        with running_server(["--max-num-seqs", str(plan.num_users), *served]) as url:
            rows = run_async(measure(url, plan, print_row))
        found = failures(rows)
        for failure in found:
            print(f"failed: {failure}")
        return {"model": model, "rows": rows, "failures": found, "outcomes": OUTCOMES}, not found

    return command.run("overload", options.output, measured)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
