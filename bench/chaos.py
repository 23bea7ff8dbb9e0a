"""Kill a server's engine again and again under open streams: what do they lose, and how long do they wait?

    python -m bench.chaos [MODEL] --kills 1000 --output chaos.json -- --device cpu      flags of vcli serve come last

The same requests run twice: undisturbed, and while the engine is killed with SIGKILL at random moments, also before it
has loaded. Every stream must end with all of its tokens. Where an engine gives the same tokens in any batch (a CPU in
fp32, a GPU with --batch-invariant) they must be the same ones; elsewhere (--ties) a token that is another one must be
as good after those before it, by the server's own log probabilities, which a lost or doubled one is not.
Exit codes: bench/command.py; 3 if anything was lost.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp
import numpy as np
import psutil

from bench import command
from bench.client import LoadClient
from bench.metrics import RequestRecord
from bench.run_async import run_async
from bench.scrape import totals
from bench.server import API, ENGINE, running_server, titled
from bench.workloads import Answer, BenchRequest
from engine.errors import UserError

TIE = 0.25  # how far below the best one, in nats, a token may be that rounding has chosen: bf16 logits have 8 bits
POLL_S = 0.02
ON_THE_WAY_S = 0.5  # tokens may come so long after the end of the engine that made them
LOADING_S = 0.6  # within which one that loads is killed


@dataclass(frozen=True)
class Plan:
    """What is sent, and how the engine is killed."""

    num_kills: int = 20
    num_streams: int = 64  # under way at any time
    input_len: int = 64  # tokens, at most
    output_len: int = 64
    longest_life_s: float = 2.0  # an engine that serves is killed at a random moment of its first so many seconds
    share_loading: float = 0.25  # of the kills: before the engine has loaded
    seed: int = 0
    has_ties: bool = False


@dataclass
class Chaos:
    """What came of it."""

    num_kills: int = 0
    num_kills_loading: int = 0
    num_streams: int = 0
    num_tokens: int = 0  # that came, the undisturbed ones among them
    num_tokens_counted: int = 0  # of those, by the server's own counter, which outlives its engines
    num_killed_under: int = 0  # streams that were open at a kill
    num_missing: int = 0  # tokens that never came
    num_extra: int = 0
    num_other: int = 0  # streams with other tokens or another text than undisturbed
    num_wrong: int = 0  # of those, the ones that no tie explains
    errors: list[str] = field(default_factory=list)
    duration_s: float = 0.0
    pauses_s: list[float] = field(default_factory=list)  # that one kill added to a stream
    long_pauses_s: list[float] = field(default_factory=list)  # that several did, one on the other

    @property
    def is_whole(self) -> bool:
        return not (self.errors or self.num_missing or self.num_extra or self.num_wrong)

    def summary(self) -> dict[str, Any]:
        figures = asdict(self)
        for name in ("pauses_s", "long_pauses_s"):
            values = figures.pop(name)
            figures |= {
                f"p{p}_{name}": round(float(np.percentile(values, p)), 3) if values else None for p in (50, 99, 100)
            }
            figures[f"num_{name[:-2]}"] = len(values)
        return figures | {"is_whole": self.is_whole}


def run(arguments: list[str], plan: Plan) -> Chaos:
    """Start a server with these arguments, and make its life hard. Raises UserError if it does not stand that."""
    many = ["--max-restarts", str(10 * plan.num_kills)]
    with running_server([*arguments, *many]) as url:
        [server] = titled(API)
        try:
            return run_async(_Run(url, server, plan).run())
        except aiohttp.ClientError as error:
            raise UserError(f"the server has given up and answers nobody: {error}") from None


class _Run:
    """One server's run."""

    def __init__(self, url: str, server: psutil.Process, plan: Plan) -> None:
        self.url, self.server, self.plan = url, server, plan
        self.random = random.Random(plan.seed)
        self.requests = [self._request(slot) for slot in range(plan.num_streams)]
        self.kills: list[float] = []  # times, by time.perf_counter()
        self.killed: set[int] = set()
        self.num_checks = 0  # requests of ours that drew one token each
        self.result = Chaos()

    def _request(self, slot: int) -> BenchRequest:
        """Prompts of different lengths; every second stream draws its tokens at random, with a seed."""
        length = self.random.randint(max(1, self.plan.input_len // 4), self.plan.input_len)
        prompt = [self.random.randint(3, 200) for _ in range(length)]
        return BenchRequest(self.plan.output_len, prompt, temperature=0.0 if self.plan.has_ties else float(slot % 2))

    async def run(self) -> Chaos:
        async with contextlib.AsyncExitStack() as stack:
            self.clients = [
                await stack.enter_async_context(
                    LoadClient(self.url, "", extensions={"return_token_ids": True, "seed": slot})
                )
                for slot in range(self.plan.num_streams)
            ]
            undisturbed = await asyncio.gather(*map(self._exchange, range(self.plan.num_streams)))
            for record, answer in undisturbed:
                self.result.num_tokens += len(answer.token_ids)
                if record.error:
                    raise UserError(f"a request failed before anything was killed: {record.error}")
            self.expected = [answer for _, answer in undisturbed]
            usual_s = statistics.median(gap for record, _ in undisturbed for gap in _gaps(record))

            start = time.perf_counter()
            killing = asyncio.create_task(self._kill())
            try:
                streams = [
                    asyncio.create_task(self._go_on(slot, killing, usual_s)) for slot in range(len(self.clients))
                ]
                await asyncio.gather(killing, *streams)
            finally:
                killing.cancel()
            self.result.duration_s = round(time.perf_counter() - start, 1)
            counters = totals(await self.clients[0].get("/metrics"))
            self.result.num_tokens_counted = int(counters["generation_tokens_total"]) - self.num_checks
        return self.result

    async def _exchange(self, slot: int) -> tuple[RequestRecord, Answer]:
        return await self.clients[slot].exchange(self.requests[slot])

    async def _go_on(self, slot: int, killing: "asyncio.Task[None]", usual_s: float) -> None:
        """One stream after the other, until enough engines have been killed."""
        while True:
            record, answer = await self._exchange(slot)
            await self._judge(slot, record, answer)
            self._note_pauses(record, usual_s)
            if killing.done() or record.error:
                return

    async def _judge(self, slot: int, record: RequestRecord, answer: Answer) -> None:
        result, expected = self.result, self.expected[slot]
        excess = len(answer.token_ids) - len(expected.token_ids)
        result.num_streams += 1
        result.num_tokens += len(answer.token_ids)
        result.num_killed_under += bisect_right(self.kills, record.ended) > bisect_right(self.kills, record.sent)
        result.num_missing += max(0, -excess)
        result.num_extra += max(0, excess)
        if record.error:
            result.errors.append(record.error)
        if answer != expected:
            result.num_other += 1
            result.num_wrong += not (self.plan.has_ties and await self._is_greedy(slot, answer.token_ids))
            self.num_checks += self.plan.has_ties

    async def _is_greedy(self, slot: int, token_ids: list[int]) -> bool:
        """Is every token the best one after those before it, but for ties?"""
        prompt = self.requests[slot].prompt
        assert isinstance(prompt, list)
        body = {"prompt": prompt + token_ids, "max_tokens": 1, "prompt_logprobs": 1, "temperature": 0}
        async with aiohttp.ClientSession() as session, session.post(f"{self.url}/v1/completions", json=body) as reply:
            choices = (await reply.json())["choices"]
        below = [
            max(each["logprob"] for each in rivals.values()) - rivals[str(token_id)]["logprob"]
            for token_id, rivals in zip(token_ids, choices[0]["prompt_logprobs"][len(prompt) :], strict=True)
        ]
        return max(below) <= TIE

    def _note_pauses(self, record: RequestRecord, usual_s: float) -> None:
        alone, together = pauses([moment for moment, _ in record.chunks], self.kills)
        self.result.pauses_s += [max(0.0, pause - usual_s) for pause in alone]
        self.result.long_pauses_s += [max(0.0, pause - usual_s) for pause in together]

    async def _kill(self) -> None:
        async with aiohttp.ClientSession() as session:
            while len(self.kills) < self.plan.num_kills:
                is_loading = bool(self.kills) and self.random.random() < self.plan.share_loading
                if not is_loading:
                    await self._until_ready(session)
                await asyncio.sleep(self.random.uniform(0.0, LOADING_S if is_loading else self.plan.longest_life_s))
                while (pid := self._engine()) is None:
                    await asyncio.sleep(POLL_S)
                os.kill(pid, signal.SIGKILL)
                self.killed.add(pid)
                self.kills.append(time.perf_counter())
                self.result.num_kills += 1
                self.result.num_kills_loading += is_loading
                _show(self.result)

    async def _until_ready(self, session: aiohttp.ClientSession) -> None:
        while True:
            async with session.get(f"{self.url}/ready") as reply:
                if reply.status == 200 and self._engine() is not None:
                    return
            await asyncio.sleep(POLL_S)

    def _engine(self) -> int | None:
        """The process that has the model or loads it, None between two of them."""
        return next((each.pid for each in titled(ENGINE, self.server) if each.pid not in self.killed), None)


def pauses(arrivals: list[float], kills: list[float]) -> tuple[list[float], list[float]]:
    """The silences of a stream that one kill made, and those in which several came. Times are of one clock, in order.

    What is on its way when the engine ends still arrives: the silence is the longest one that begins until soon after.
    """
    if not arrivals:
        return [], []
    silences = dict[tuple[float, float], None]()
    for kill in kills[bisect_right(kills, arrivals[0]) : bisect_right(kills, arrivals[-1])]:
        first = bisect_right(arrivals, kill) - 1
        last = max(first + 1, min(bisect_right(arrivals, kill + ON_THE_WAY_S), len(arrivals) - 1))
        gaps = list(itertools.pairwise(arrivals[first : last + 1]))
        if gaps:
            silences[max(gaps, key=lambda gap: gap[1] - gap[0])] = None
    alone, together = list[float](), list[float]()
    for before, after in silences:
        num_kills = bisect_right(kills, after) - bisect_right(kills, before - ON_THE_WAY_S)
        (alone if num_kills <= 1 else together).append(after - before)
    return alone, together


def _gaps(record: RequestRecord) -> list[float]:
    arrivals = [moment for moment, _ in record.chunks]
    return [after - before for before, after in itertools.pairwise(arrivals)]


def _show(result: Chaos) -> None:
    if result.num_kills % 50 == 0:
        print(f"{result.num_kills} kills, {result.num_streams} streams, whole: {result.is_whole}", file=sys.stderr)


def main(arguments: list[str]) -> int:
    parser = command.parser("chaos", __doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--streams", type=int, default=64, help="under way at any time")
    parser.add_argument("--input-len", type=int, default=64, help="tokens of a prompt, at most")
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--longest-life", type=float, default=2.0, help="seconds in which one that serves is killed")
    parser.add_argument("--share-loading", type=float, default=0.25, help="of the kills: before the engine has loaded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ties", action="store_true", help="another token is right if it is as good as the best")
    options, served = command.parse(parser, arguments)
    plan = Plan(
        num_kills=options.kills,
        num_streams=options.streams,
        input_len=options.input_len,
        output_len=options.output_len,
        longest_life_s=options.longest_life,
        share_loading=options.share_loading,
        seed=options.seed,
        has_ties=options.ties,
    )

    def measure() -> tuple[dict[str, Any], bool]:
        chaos = run(served, plan)
        print(json.dumps(chaos.summary(), indent=2))
        return {"plan": asdict(plan), "result": chaos.summary()}, chaos.is_whole

    return command.run("chaos", options.output, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
