"""When requests are sent: arrivals by their distribution, repeats by their number."""

import asyncio
import itertools
import math
from collections import Counter

import pytest

from bench.client_processes import num_processes
from bench.load import Load, arrivals, closed_loop, nth_request
from bench.metrics import RequestRecord
from bench.workloads import BenchRequest, random_requests

REQUESTS = random_requests(100, input_len=4, output_len=100, vocab_size=1000, seed=0)


def gaps(rate: float, burstiness: float, seed: int = 1) -> list[float]:
    moments = itertools.islice(arrivals(Load(request_rate=rate, burstiness=burstiness, seed=seed), REQUESTS), 4000)
    return [after - before for before, after in itertools.pairwise(moments)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_asked_rate_and_the_spread_of_their_burstiness(burstiness: float):
    found = gaps(50.0, burstiness)

    mean = sum(found) / len(found)
    deviation = (sum((gap - mean) ** 2 for gap in found) / len(found)) ** 0.5
    assert mean == pytest.approx(1 / 50, rel=0.1)
    assert deviation / mean == pytest.approx(burstiness**-0.5, rel=0.1)  # of a gamma distribution; Poisson: 1


def test_infinite_burstiness_is_a_constant_gap():
    assert gaps(50.0, math.inf) == pytest.approx([1 / 50] * 3999)


def test_arrivals_are_the_same_for_a_seed():
    assert gaps(50.0, 1.0, seed=1) == gaps(50.0, 1.0, seed=1) != gaps(50.0, 1.0, seed=2)


def test_an_infinite_rate_sends_everything_at_once():
    assert list(itertools.islice(arrivals(Load(request_rate=math.inf), REQUESTS), 3)) == [0.0, 0.0, 0.0]


def test_a_list_that_is_gone_through_again_knows_how_often():
    requests = [BenchRequest(1, [7]), BenchRequest(1, [8])]

    found = [nth_request(requests, index) for index in range(5)]

    assert [(request.prompt, request.repeat) for request in found] == [([7], 0), ([8], 0), ([7], 1), ([8], 1), ([7], 2)]


@pytest.mark.parametrize(("num_begun", "most_at_once"), [(0, 8), (8, 1)])
def test_requests_of_one_length_come_in_waves_unless_the_first_ones_are_sent_as_if_they_had_begun(
    num_begun: int, most_at_once: int
):
    """Eight users of a server that makes a token of each request in each step."""
    sent: Counter[int] = Counter()  # requests, by the step in which they came

    class Server:
        step = 0

        async def exchange(self, request: BenchRequest) -> tuple[RequestRecord, None]:
            sent[self.step] += 1
            end = self.step + request.output_len
            while self.step < end:
                await asyncio.sleep(0)
            return RequestRecord(sent=0.0), None

    class Turns:
        is_closed = False
        numbers = iter(range(80))

        def take(self) -> int | None:
            return next(self.numbers, None)

    async def run() -> None:
        server = Server()
        load = closed_loop(server, [BenchRequest(16, [7])], 8, Turns(), lambda record: None, num_begun)  # type: ignore[arg-type]
        task = asyncio.create_task(load)
        while not task.done():
            for _ in range(20):  # all that can be done within a step is done
                await asyncio.sleep(0)
            server.step += 1

    asyncio.run(run())
    assert max(num for step, num in sent.items() if step > 0) == most_at_once


@pytest.mark.parametrize(
    ("load", "cores", "expected"),
    [
        (Load(concurrency=16), 16, 1),
        (Load(concurrency=32), 16, 1),
        (Load(concurrency=64), 16, 2),
        (Load(concurrency=2000), 64, 4),  # no more than there are requests
        (Load(concurrency=200, duration_s=9.0), 16, 4),  # which are sent again and again
        (Load(request_rate=10.0), 16, 1),
        (Load(request_rate=600.0), 16, 3),  # 60,000 tokens a second
        (Load(request_rate=1e6), 16, 4),
        (Load(concurrency=65), 2, 1),
    ],
)
def test_a_load_gets_processes_by_its_tokens_and_leaves_cores_to_the_server(
    monkeypatch, load: Load, cores: int, expected: int
):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(cores))

    assert num_processes(load, REQUESTS) == expected
