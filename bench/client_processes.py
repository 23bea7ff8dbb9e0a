"""The load client's processes: as many as the load needs, apart from whatever else the bench is doing.

They share two numbers, how many requests have been sent and when no more are, and report each request as it ends. All
times are of one clock, which processes of a machine have in common.
"""

import asyncio
import contextlib
import ctypes
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import msgspec

from bench.client import LoadClient
from bench.load import LagMeter, Load, OnRecord, arrivals, closed_loop, open_loop
from bench.metrics import RequestRecord
from bench.workloads import BenchRequest
from engine.child import die_with_parent
from engine.errors import UserError

# One process reads about 45,000 tokens a second (measured on an H200's host). A stream at a fast decode step of 2.5 ms
# has 400 of them: with 64 streams it is more than a third idle, but late when many of them begin at once.
STREAMS_PER_PROCESS = 32
TOKENS_PER_PROCESS = 64 * 400  # a second
CORES_PER_PROCESS = 4  # the server has most of the machine's
HEAD_START_S = 0.02  # from the word to the first request, so that all processes have heard it
STOP_TIMEOUT_S = 5.0

_spawn = multiprocessing.get_context("spawn")


class _Report(msgspec.Struct):
    """What a process tells: a request that has ended or, as its last word, how late it has been itself."""

    record: RequestRecord | None = None
    lag: LagMeter | None = None


@dataclass(frozen=True)
class _Task:
    """What a process is told when it starts."""

    rank: int
    num_processes: int
    client: dict[str, Any]  # the arguments of its LoadClient
    requests: list[BenchRequest]
    load: Load


@dataclass(frozen=True)
class SharedTurnstile:
    """Hands out the numbers of requests (a conversation has one), in order, to all processes."""

    limit: float = math.inf
    _next: "Synchronized[int]" = field(default_factory=lambda: _spawn.Value("q", 0))
    _deadline: "ctypes.c_double" = field(default_factory=lambda: _spawn.Value("d", math.inf, lock=False))

    def take(self) -> int | None:
        with self._next.get_lock():
            index = self.num_taken
            if index >= self.limit or self.is_closed:
                return None
            self._next.value = index + 1
            return index

    @property
    def num_taken(self) -> int:
        """Read past the lock, which a process that was killed or stopped may hold."""
        return self._next.get_obj().value

    @property
    def is_closed(self) -> bool:
        return time.perf_counter() >= self._deadline.value

    def close_at(self, moment: float) -> None:
        self._deadline.value = moment


def num_processes(load: Load, requests: Sequence[BenchRequest]) -> int:
    """How many client processes a load needs, with most of the machine left to a server on it."""
    if load.concurrency is not None:
        most = len(requests) if load.duration_s is None else load.concurrency
        share = min(load.concurrency, most) / STREAMS_PER_PROCESS
    elif load.request_rate is None or math.isinf(load.request_rate):
        share = len(requests) / STREAMS_PER_PROCESS
    else:
        tokens = sum(request.output_len for request in requests) / len(requests)
        share = load.request_rate * tokens / TOKENS_PER_PROCESS
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(math.ceil(share), cores // CORES_PER_PROCESS))


class ClientProcesses:
    """Started, and waiting for the word. Owns the processes: use it with `async with`."""

    def __init__(self, client: dict[str, Any], requests: list[BenchRequest], load: Load) -> None:
        limit = math.inf if load.duration_s is not None else len(requests)
        self.turnstile = SharedTurnstile(limit=limit)
        count = num_processes(load, requests)
        self._tasks = [_Task(rank, count, client, requests, load) for rank in range(count)]
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    async def __aenter__(self) -> "ClientProcesses":
        try:
            with _sigint_held_back(), _no_main_module():  # Ctrl-C is for this process, which ends the others
                for task in self._tasks:
                    ours, theirs = _spawn.Pipe()
                    process = _spawn.Process(target=_main, args=(task, self.turnstile, theirs), daemon=True)
                    process.start()
                    theirs.close()
                    self._processes.append(process)
                    self._pipes.append(ours)
            for pipe in self._pipes:
                await self._receive(pipe)
        except BaseException:
            self._stop()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stop()

    async def run(self, on_record: OnRecord) -> tuple[float, list[LagMeter]]:
        """Send the load to its end. Returns when it began, and how late each process was."""
        start = time.perf_counter() + HEAD_START_S
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # a dead one is told of when its report is waited for
                pipe.send_bytes(msgspec.msgpack.encode(start))
        following = [asyncio.create_task(self._follow(pipe, on_record)) for pipe in self._pipes]
        try:
            return start, list(await asyncio.gather(*following))
        finally:  # none reads a pipe that is closed
            for task in following:
                task.cancel()
            await asyncio.wait(following)

    async def _follow(self, pipe: Connection, on_record: OnRecord) -> LagMeter:
        while True:
            report = await self._receive(pipe)
            if report.record is not None:
                on_record(report.record)
            elif report.lag is not None:
                return report.lag

    async def _receive(self, pipe: Connection) -> _Report:
        await _readable(pipe.fileno())
        try:
            return _decode(pipe.recv_bytes())
        except (EOFError, OSError):
            raise UserError(
                "a process of the load client ended before its load did: see its last words above"
            ) from None

    def _stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(STOP_TIMEOUT_S)
            if process.is_alive():  # stopped, perhaps: only this reaches it
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()


_decode = msgspec.msgpack.Decoder(_Report).decode


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


@contextlib.contextmanager
def _sigint_held_back() -> Iterator[None]:
    """Ctrl-C waits until the block ends, and processes started in it never hear of it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Processes spawned in it do not import this one's main module, and torch with it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _main(task: _Task, turnstile: SharedTurnstile, pipe: Connection) -> None:
    """A client process from its first breath to its last word."""
    import uvloop  # halves the client's own time for each token

    die_with_parent()

    def tell(report: _Report) -> None:
        pipe.send_bytes(msgspec.msgpack.encode(report))

    with contextlib.suppress(EOFError, BrokenPipeError):  # nobody listens any more
        tell(_Report())
        start: float = msgspec.msgpack.decode(pipe.recv_bytes())
        lag = uvloop.run(_drive(task, turnstile, start, lambda record: tell(_Report(record=record))))
        tell(_Report(lag=lag))


async def _drive(task: _Task, turnstile: SharedTurnstile, start: float, on_record: OnRecord) -> LagMeter:
    lag, load = LagMeter(), task.load
    async with LoadClient(**task.client) as client:
        while (left := start - client.clock()) > 0:  # event loops may wake up a little early
            await asyncio.sleep(left)
        async with lag.watching():
            if load.concurrency is not None:
                num_users = len(range(task.rank, load.concurrency, task.num_processes))
                num_begun = load.concurrency if load.duration_s is not None else 0  # where the ramp-up does not count
                await closed_loop(client, task.requests, num_users, turnstile, on_record, num_begun)
            else:
                moments = _own_moments(task, start)
                await open_loop(client, task.requests, moments, turnstile, lag, on_record)
    return lag


def _own_moments(task: _Task, start: float) -> Iterator[tuple[int, float]]:
    """Every n-th arrival: the number of its request, and when; -inf at an infinite rate, where none is ever due."""
    is_endless = task.load.duration_s is not None and task.load.request_rate is not None
    offsets = itertools.islice(arrivals(task.load, task.requests), None if is_endless else len(task.requests))
    start = -math.inf if task.load.request_rate == math.inf else start
    moments = ((index, start + offset) for index, offset in enumerate(offsets))
    return itertools.islice(moments, task.rank, None, task.num_processes)
