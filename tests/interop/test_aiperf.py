"""Our latencies of a server beside those of aiperf, an independent load generator, of the same server.

Both send the same prompts at the same time, so that whatever else the machine does falls on both. `make interop
LIBRARIES=aiperf` builds the environment; without it the tests are skipped. `-s` shows the figures.
"""

import asyncio
import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from bench.load import Load
from bench.metrics import RequestRecord
from bench.server import running_server
from bench.serving import measure
from bench.workloads import BenchRequest
from engine.hub import resolve_model
from tests.bench.fake_server import FakeServer, running_fake_server

ROOT = Path(__file__).resolve().parents[2]
AIPERF = ROOT / ".interop" / "aiperf" / "bin" / "aiperf"
NUM_REQUESTS = 60
CONCURRENCY = 2
OUTPUT_LEN = 24
TOLERANCE = 0.03
SAME_READ_MS = 1.0

pytestmark = [
    pytest.mark.skipif(not AIPERF.exists(), reason="`make interop LIBRARIES=aiperf` builds its environment"),
    pytest.mark.timeout(600),
]


@dataclass
class Latencies:
    """Milliseconds, one a request; gaps of all requests, between arrivals however many tokens came in each."""

    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    e2el: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)  # ours alone: a gap for each token


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """aiperf wants a folder, although it is told to take the server's counts."""
    from transformers import AutoTokenizer

    folder, model = tmp_path_factory.mktemp("tokenizer"), resolve_model("")
    AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts() -> list[str]:
    words = (ROOT / "bench" / "texts" / "persuasion.txt").read_text(encoding="utf-8").split()
    return [" ".join(words[i * 60 : (i + 1) * 60]) for i in range(NUM_REQUESTS)]


@pytest.fixture
def known_server() -> Iterator[FakeServer]:
    """Its first token takes 250 ms, each further one 40 ms."""
    with running_fake_server() as server:
        server.first_token_s, server.gap_s = 0.25, 0.04
        yield server


@dataclass
class ReplayingServer(FakeServer):
    """Answers each prompt with a stream that was recorded, byte for byte and each piece at its moment."""

    streams: dict[str, list[tuple[float, bytes]]] = field(default_factory=dict)  # seconds from the request

    async def _stream(self, request: web.Request, body: dict[str, Any], fail: str) -> web.StreamResponse:
        received = time.perf_counter()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for moment, data in self.streams.get(body["prompt"]) or self.streams[""]:
            await asyncio.sleep(max(0.0, received + moment - time.perf_counter()))
            await response.write(data)
        return response


def test_both_see_a_server_of_known_times_alike(known_server: FakeServer, tokenizer: Path, prompts, tmp_path: Path):
    ours, theirs = measure_both(known_server, prompts, tokenizer, tmp_path)

    assert_alike(ours, theirs, "ttft", "tpot", "gaps", "e2el")


def test_chunks_of_several_tokens_are_gaps_to_us_and_one_to_aiperf(
    known_server: FakeServer, tokenizer: Path, prompts, tmp_path: Path
):
    known_server.tokens_per_chunk = 4

    ours, theirs = measure_both(known_server, prompts, tokenizer, tmp_path)

    assert_alike(ours, theirs, "ttft", "tpot", "gaps", "e2el")
    assert statistics.median(theirs.gaps) == pytest.approx(4 * statistics.median(ours.itl), rel=TOLERANCE)


def test_both_see_vcli_alike(tokenizer: Path, prompts, tmp_path: Path):
    """Its streams are recorded under load and played to both, because no two runs are alike within 3 % everywhere."""
    with running_server(["--no-enable-prefix-caching", "--max-num-seqs", "8"]) as url:
        streams = asyncio.run(record(url, prompts))
    with running_fake_server(ReplayingServer(streams=streams | {"": streams[prompts[0]]})) as server:
        ours, theirs = measure_both(server, prompts, tokenizer, tmp_path)

    assert_alike(ours, theirs, "ttft", "tpot", "gaps", "e2el")


async def record(url: str, prompts: list[str]) -> dict[str, list[tuple[float, bytes]]]:
    """The server's answers to all prompts, CONCURRENCY of them at a time."""
    streams: dict[str, list[tuple[float, bytes]]] = {}
    waiting = iter(prompts)

    async def user(session: aiohttp.ClientSession) -> None:
        for prompt in waiting:
            body = {"prompt": prompt, "max_tokens": OUTPUT_LEN, "ignore_eos": True, "temperature": 0, "stream": True}
            sent = time.perf_counter()
            async with session.post(
                "/v1/completions", json=body | {"stream_options": {"include_usage": True}}
            ) as answer:
                streams[prompt] = [(time.perf_counter() - sent, data) async for data in answer.content.iter_any()]

    async with aiohttp.ClientSession(url, raise_for_status=True) as session:
        await asyncio.gather(*(user(session) for _ in range(CONCURRENCY)))
    return streams


def assert_alike(ours: Latencies, theirs: Latencies, *names: str) -> None:
    """By the medians, which forget a moment in which one client was held up."""
    ratios = {}
    for name in names:
        our, their = (statistics.median(getattr(each, name)) for each in (ours, theirs))
        ratios[name] = our / their
        print(f"{name:5} {our:8.2f} ms, by aiperf's {our / their - 1:+.2%}")
    assert ratios == {name: pytest.approx(1, abs=TOLERANCE) for name in names}


def measure_both(server: FakeServer, prompts: list[str], tokenizer: Path, folder: Path) -> tuple[Latencies, Latencies]:
    """Both clients at once, each with CONCURRENCY requests under way."""
    requests = [BenchRequest(OUTPUT_LEN, prompt) for prompt in prompts]
    peer = start_aiperf(server.url, prompts, tokenizer, folder)
    try:
        while peer.poll() is None and not server.bodies:
            time.sleep(0.05)  # it takes its time to begin
        run = asyncio.run(measure(server.url, "fake", requests, Load(concurrency=CONCURRENCY)))
        assert peer.wait(120) == 0, (folder / "aiperf.log").read_text()
    finally:
        peer.kill()
        peer.wait()
    lines = (folder / "out" / "profile_export.jsonl").read_text().splitlines()
    ours, theirs = our_latencies(run.records), their_latencies([json.loads(line)["metrics"] for line in lines])
    assert len(ours.ttft) == len(theirs.ttft) == len(prompts)
    return ours, theirs


def start_aiperf(url: str, prompts: list[str], tokenizer: Path, folder: Path) -> "subprocess.Popen[bytes]":
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"text": prompt}) for prompt in prompts))
    flags = {
        "--url": url,
        "--model": "fake",
        "--tokenizer": tokenizer,
        "--endpoint-type": "completions",
        "--input-file": folder / "prompts.jsonl",
        "--custom-dataset-type": "single_turn",
        "--dataset-sampling-strategy": "sequential",
        "--extra-inputs": json.dumps({"max_tokens": OUTPUT_LEN, "ignore_eos": True, "temperature": 0}),
        "--concurrency": CONCURRENCY,
        "--request-count": len(prompts),
        "--ui": "none",
        "--artifact-dir": folder / "out",
    }
    switches = ["--streaming", "--use-server-token-count", "--use-legacy-max-tokens"]
    command = [str(word) for word in (AIPERF, "profile", *switches, *(word for pair in flags.items() for word in pair))]
    with (folder / "aiperf.log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)


def our_latencies(records: list[RequestRecord]) -> Latencies:
    found = Latencies()
    for record in records:
        assert not record.error
        found.ttft.append(record.ttft * 1e3)
        found.tpot.append((record.tpot or 0.0) * 1e3)
        moments = [moment for moment, _ in record.chunks]
        found.gaps += [(after - before) * 1e3 for before, after in itertools.pairwise(moments)]
        found.itl += [gap * 1e3 for gap in record.gaps]
        found.e2el.append(record.e2el * 1e3)
    return found


def their_latencies(requests: list[dict[str, Any]]) -> Latencies:
    """In our words: their inter-token latency is our TPOT, their inter-chunk latencies are our gaps."""
    found = Latencies()
    for metrics in requests:
        found.ttft.append(metrics["time_to_first_token"]["value"])
        found.tpot.append(metrics["inter_token_latency"]["value"])
        # Events that it read at once are one arrival for us.
        found.gaps += [gap for gap in metrics["inter_chunk_latency"]["value"] if gap > SAME_READ_MS]
        found.e2el.append(metrics["request_latency"]["value"])
    return found
