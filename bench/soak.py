"""Thousands of short requests, good and bad ones mixed (bench/hostile.py): does a server stay as it was?

    python -m bench.soak [MODEL] --requests 20000 --output soak.json -- --device cpu      flags of vcli serve come last

Every sound request must be answered as it was at the start, alone; every other one must get an answer that is no
server error, or none where it is no HTTP. At the end all KV blocks must be free, the server's and the engine's resident
memory must be what they were after a warm-up (within 5 %), and their log must hold no error. For an engine whose tokens
depend on what else is in a batch (bf16) `--any-tokens` compares their number alone.
Exit codes: bench/command.py; 3 if any of that is not so.
"""

import asyncio
import contextlib
import json
import re
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from bench import command
from bench.hostile import Visit, Visitors, post
from bench.run_async import run_async
from bench.scrape import totals
from bench.server import API, ENGINE, running_server, titled
from engine.errors import UserError

MAX_GROWTH = 0.05  # of resident memory after the warm-up
WARM_UP = 0.25  # share of the visits
NUM_SAMPLES = 400  # of memory
SETTLE_S = 20.0  # for the last streams that nobody reads to be ended
CACHE = ["--kv-cache-memory", "64MiB"]  # all of it is used in the warm-up: it takes no memory before
LOG_ERROR = re.compile(r"Traceback|\b(ERROR|CRITICAL)\b|^\S*(Error|Exception)\b", re.MULTILINE)
NUM_SHOWN = 20
LOG_LINES = 15


@dataclass(frozen=True)
class Plan:
    """What is sent."""

    num_requests: int = 2000
    concurrency: int = 32
    seed: int = 0
    vocab_size: int = 200
    spoilt_token: int | None = None
    any_tokens: bool = False


@dataclass
class Soak:
    """What came of it."""

    statuses: dict[str, dict[str, int]] = field(default_factory=dict)  # how many, by kind of visit
    failures: list[str] = field(default_factory=list)
    num_failures: int = 0
    rss_bytes: dict[str, list[int]] = field(default_factory=dict)  # by process: after the warm-up, at the end
    rss_mb: dict[str, list[int]] = field(default_factory=dict)  # the same over time, from the first visit to the last
    log_errors: list[str] = field(default_factory=list)
    gauges: dict[str, float] = field(default_factory=dict)  # at the end
    duration_s: float = 0.0

    @property
    def growth(self) -> dict[str, float]:
        return {name: round(last / first - 1, 4) for name, (first, last) in self.rss_bytes.items()}

    @property
    def is_sound(self) -> bool:
        is_clean = not (self.num_failures or self.log_errors or any(self.gauges.values()))
        return is_clean and all(growth <= MAX_GROWTH for growth in self.growth.values())

    def fail(self, what: str) -> None:
        self.num_failures += 1
        if len(self.failures) < NUM_SHOWN:
            self.failures.append(what)
            print(what, file=sys.stderr)

    def summary(self) -> dict[str, Any]:
        return {"is_sound": self.is_sound, "growth": self.growth, **asdict(self)}


def run(arguments: list[str], plan: Plan) -> Soak:
    """Start a server with these arguments and visit it. Raises UserError if it does not come up, or dies."""
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "log"
        flags = [] if CACHE[0] in arguments else CACHE
        with running_server([*arguments, *flags], log_path=log_path) as url:
            [server] = titled(API)
            try:
                soak = run_async(visit(url, server, plan))
            except ConnectionRefusedError:
                last_words = "\n".join(log_path.read_text(errors="replace").splitlines()[-LOG_LINES:])
                raise UserError(f"the server is gone; its last words:\n{last_words}") from None
        soak.log_errors = log_errors(log_path.read_text(errors="replace"))
    return soak


def log_errors(log: str) -> list[str]:
    """The lines of a server's log that tell of something that should not happen."""
    return [line for line in log.splitlines() if LOG_ERROR.search(line)][:NUM_SHOWN]


async def visit(url: str, server: psutil.Process, plan: Plan) -> Soak:
    """Send a server all visits of a plan, and judge it."""
    return await _Run(url, server, plan).run()


class _Run:
    """One server's run."""

    def __init__(self, url: str, server: psutil.Process, plan: Plan) -> None:
        self.url, self.server, self.plan = url, server, plan
        host, _, port = url.removeprefix("http://").partition(":")
        self.address = (host, int(port))
        self.visitors = Visitors(plan.seed, plan.vocab_size, plan.spoilt_token)
        self.expected: dict[bytes, list[str]] = {}
        self.num_done = 0
        self.samples: list[tuple[int, dict[str, int]]] = []  # visits done, resident bytes by process
        self.soak = Soak()

    async def run(self) -> Soak:
        start = time.perf_counter()
        for each in self.visitors.sound:
            answer = await self._answer(each)
            if answer.status != 200:
                raise UserError(
                    f"a sound request was refused before anything else: {answer.status} {answer.body[:300]!r}"
                )
            self.expected[each.body] = answer.texts()
        numbers = iter(range(self.plan.num_requests))
        await asyncio.gather(*(self._work(numbers) for _ in range(self.plan.concurrency)))
        await self._settle()
        self._judge_memory()
        self.soak.duration_s = round(time.perf_counter() - start, 1)
        return self.soak

    async def _work(self, numbers: Any) -> None:
        for number in numbers:
            visit = self.visitors.visit(number)
            answer = await self._answer(visit)
            counts = self.soak.statuses.setdefault(visit.kind, {})
            counts[answer.outcome] = counts.get(answer.outcome, 0) + 1
            if wrong := self._wrong(visit, answer):
                self.soak.fail(f"visit {number} ({visit.kind}): {wrong}; sent {visit.data[-400:]!r}")
            self.num_done += 1
            if self.num_done % max(1, self.plan.num_requests // NUM_SAMPLES) == 0:
                self.samples.append((self.num_done, self._resident()))
            if self.num_done % 1000 == 0:
                print(f"{self.num_done} visits, {self.soak.num_failures} failures", file=sys.stderr)

    def _wrong(self, visit: Visit, answer: "Answer") -> str | None:
        """What is wrong with an answer, None if nothing is."""
        if answer.has_left:
            return "no answer in time" if visit.is_sound else None
        if answer.status is None:
            return None if visit.may_be_no_http else "the server closed the connection without an answer"
        is_nan = self.plan.spoilt_token is not None and b'"invalid_logits"' in answer.body
        if visit.must_fail or (is_nan and not visit.is_sound):  # others may draw the spoilt token, but for sound ones
            return None if is_nan else f"NaN went unnoticed: {answer.body[-300:]!r}"
        if answer.status == 503 and b"x-request-deadline-ms: 1\r\n" in visit.data:
            return None  # it has come too late, as it was told to
        if answer.status >= 500 or (b'"error":' in answer.body[-2000:] and answer.status == 200):
            return f"status {answer.status}: {answer.body[-300:]!r}"
        if visit.is_sound:
            expected, texts = self.expected[visit.body], answer.texts()
            if self.plan.any_tokens:
                expected, texts = [""] * len(expected), [""] * len(texts)
            return None if texts == expected else f"{answer.status}, {texts} instead of {expected}"
        if answer.status >= 400 and not visit.may_be_no_http:
            return None if _is_error(answer.body) else f"an error of another shape: {answer.body[-300:]!r}"
        return None

    async def _answer(self, visit: Visit) -> "Answer":
        """What a visit is answered; of one that comes back all parts in one."""
        answer = await self._exchange(visit)
        if not visit.comes_back:
            return answer
        path, events = visit.data.split(b" ", 2)[1].decode(), answer.events()
        while answer.has_left and answer.status == 200 and events:
            last = b"last-event-id: " + events[-1].partition(b"\n")[0].removeprefix(b"id: ")
            answer = await self._exchange(replace(visit, data=post(path, {}, [last])))
            events += answer.events()
        answer.body = b"".join(event.partition(b"\n")[2] + b"\n\n" for event in events) or answer.body
        return answer

    async def _exchange(self, visit: Visit) -> "Answer":
        reader, writer = await asyncio.open_connection(*self.address)
        answer = Answer()
        try:
            async with asyncio.timeout(visit.patience_s):
                with contextlib.suppress(ConnectionError):  # what has come before it is the answer
                    writer.write(visit.data)
                    await writer.drain()
                    answer.has_left = visit.num_events == 0
                    while not answer.has_left and (part := await reader.read(1 << 16)):
                        answer.received += part
                        num_events = answer.received.count(b"data: ")
                        answer.has_left = visit.num_events is not None and num_events >= visit.num_events
        except TimeoutError:
            answer.has_left = True
        finally:
            if answer.has_left:
                writer.transport.abort()
            writer.close()
        answer.read()
        return answer

    def _resident(self) -> dict[str, int]:
        resident = {}
        for title, process in ((API, self.server), *((ENGINE, each) for each in titled(ENGINE, self.server))):
            with contextlib.suppress(psutil.Error):
                resident[title] = process.memory_info().rss
        return resident

    async def _settle(self) -> None:
        """Wait until nothing runs any more; what still does in the end is a leak."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        deadline = time.perf_counter() + SETTLE_S
        async with aiohttp.ClientSession() as session:
            while True:
                async with session.get(f"{self.url}/metrics") as reply:
                    values = totals(await reply.text())
                self.soak.gauges = {name: values[name] for name in names}
                if not any(self.soak.gauges.values()) or time.perf_counter() > deadline:
                    return
                await asyncio.sleep(0.1)

    def _judge_memory(self) -> None:
        """Of each process the median size after the warm-up, and at the end: a tenth of the visits each."""
        total = self.plan.num_requests
        for name in self._resident():
            windows: list[list[int]] = [
                [sizes[name] for done, sizes in self.samples if name in sizes and first <= done / total <= first + 0.1]
                for first in (WARM_UP, 0.9)
            ]
            if all(windows):
                self.soak.rss_bytes[name] = [int(statistics.median(window)) for window in windows]
                every = max(1, len(self.samples) // 20)
                self.soak.rss_mb[name] = [sizes.get(name, 0) // 10**6 for _, sizes in self.samples[::every]]


@dataclass
class Answer:
    """What came back over a connection."""

    received: bytes = b""
    has_left: bool = False  # the client, before the end
    status: int | None = None
    body: bytes = b""

    @property
    def outcome(self) -> str:
        return "left" if self.has_left else str(self.status) if self.status else "closed"

    def read(self) -> None:
        head, _, body = self.received.partition(b"\r\n\r\n")
        if match := re.match(rb"HTTP/1\.1 (\d{3}) ", head):
            self.status = int(match[1])
            self.body = _unchunked(body) if b"transfer-encoding: chunked" in head.lower() else body

    def events(self) -> list[bytes]:
        """Those that have come whole."""
        return [event for event in self.body.split(b"\n\n")[:-1] if not event.startswith(b":")]

    def texts(self) -> list[str]:
        """The text of each choice and how it ended, streamed or whole."""
        is_stream = self.body.startswith(b"data: ")
        lines = self.body.split(b"\n\n") if is_stream else [self.body]
        parts = [line.removeprefix(b"data: ") for line in lines if line and not line.startswith(b":")]
        if is_stream and parts.pop() != b"[DONE]":
            return ["the stream has no end"]
        texts: dict[int, str] = {}
        for part in parts:
            for choice in json.loads(part).get("choices", []):
                text = choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""
                end = f" ({choice['finish_reason']})" if choice.get("finish_reason") else ""
                texts[choice["index"]] = texts.get(choice["index"], "") + text + end
        return [texts[index] for index in sorted(texts)]


def _unchunked(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size or b"0", 16)
        parts.append(body[:length])
        body = body[length + 2 :]
    return b"".join(parts)


def _is_error(body: bytes) -> bool:
    try:
        return bool(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return False


def main(arguments: list[str]) -> int:
    parser = command.parser("soak", __doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=32, help="connections at any time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--any-tokens", action="store_true", help="compare the number of choices, and no text")
    options, served = command.parse(parser, arguments)
    plan = Plan(options.requests, options.concurrency, options.seed, any_tokens=options.any_tokens)

    def measure() -> tuple[dict[str, Any], bool]:
        soak = run(served, plan)
        print(json.dumps(soak.summary(), indent=2))
        return {"plan": asdict(plan), "result": soak.summary()}, soak.is_sound

    return command.run("soak", options.output, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
