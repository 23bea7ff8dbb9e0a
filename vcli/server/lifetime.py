"""The API process from its first moment to its exit code.

HTTP answers at once, the engine loads beside it. SIGTERM or SIGINT lets open requests finish and ends with 0, a second
signal ends at once; when the engine keeps dying its cause is the last thing said, and the exit code is 1. What always
holds: this process owns the engine's, and never ends before it.
"""

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import time
from dataclasses import dataclass

import setproctitle
import uvloop

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.errors import UserError
from engine.link import EngineLink
from engine.messages import Ready
from engine.outputs import RequestState
from engine.quarantine import QuarantinedError, describe
from engine.timeline import Timeline, process_start_time
from vcli.console import console, format_seconds, print_table
from vcli.server.admission import Admission
from vcli.server.app import make_admin_app, make_app
from vcli.server.config import ServerConfig
from vcli.server.dashboard.feed import Feed
from vcli.server.dashboard.sampler import Sampler
from vcli.server.http import LAST_WORDS_S, http_server, url_of
from vcli.server.keys import Keys
from vcli.server.metrics import Metrics
from vcli.server.service import Service
from vcli.server.templates import Templates
from vcli.server.tls import Certificate
from vcli.server.tracing import Traces
from vcli.version import version

WATCH_INTERVAL_S = 0.1

log = logging.getLogger("vcli")


@dataclass(frozen=True)
class Plan:
    """What is to be served, with everything that can be wrong already checked."""

    engine: EngineConfig
    server: ServerConfig
    model_name: str
    model_root: str
    chat_template: str | None
    keys: Keys
    certificate: Certificate | None
    traces: Traces | None
    listener: socket.socket
    admin_listener: socket.socket | None
    link: EngineLink  # to the engine's process, which starts beside this one
    timeline: Timeline


def run(plan: Plan) -> int:
    """Serve until a signal or the engine's death; the process's exit code."""
    setproctitle.setproctitle("vcli: api")
    _allow_many_connections()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Lifetime(plan).run())


class Lifetime:
    """Owns the engine, the HTTP server and the signals."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.engine = AsyncEngine(
            plan.engine,
            link=plan.link,
            timeline=plan.timeline,
            max_restarts=plan.server.max_restarts,
            step_timeout_s=plan.server.step_timeout_s,
        )
        admission = Admission(self.engine, plan.server.max_queue, plan.server.max_queue_tokens)
        metrics = Metrics(plan.model_name, self.engine, admission)
        self.engine.on_step.append(metrics.on_step)
        self.engine.on_finish.append(metrics.on_finish)
        self.engine.on_restart.append(self._report_restart)
        self.engine.on_conviction.append(self._report_conviction)
        self.service = Service(
            config=plan.server,
            keys=plan.keys,
            certificate=plan.certificate,
            traces=plan.traces,
            engine=self.engine,
            model_name=plan.model_name,
            model_root=plan.model_root,
            chat_template=plan.chat_template,
            templates=Templates(),
            admission=admission,
            metrics=metrics,
            feed=Feed(Sampler(self.engine, admission, metrics)),
        )
        self.signals: list[int] = []
        self._signalled = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> int:
        servers = [(make_app(self.service), self.plan.listener)]
        if self.plan.admin_listener is not None:
            servers.append((make_admin_app(self.service), self.plan.admin_listener))
        running = [(http_server(app, self.service.certificate), listener) for app, listener in servers]
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        await self.engine.start()
        sampling = asyncio.create_task(self.service.feed.run())
        serving = [asyncio.create_task(http.serve(sockets=[listener])) for http, listener in running]
        try:
            if await self._until_ready():
                gc.freeze()  # what is there stays: collections need not look at it, which took 20 ms of the loop's time
                self._report()
                await self._until_end()
            await self._drain()
        finally:
            died = self.engine.error
            sampling.cancel()
            self.service.feed.close()
            for http, _ in running:
                http.should_exit = True
            await self.engine.shutdown()
            await asyncio.gather(*serving)
            await self.service.templates.close()
            if self.plan.traces is not None:
                await asyncio.to_thread(self.plan.traces.close)
        if died is not None:
            raise UserError(died)
        return 128 + self.signals[1] if len(self.signals) > 1 else 0

    async def _until_ready(self) -> bool:
        """Tell how loading goes. False if a signal or the engine's death came first."""
        loading = asyncio.create_task(self.engine.wait_ready())
        signalled = asyncio.create_task(self._signalled.wait())
        shown = ""
        with console.status("starting") as status:  # moves on a terminal; elsewhere each stage is one line
            while not loading.done() and not signalled.done():
                stage, fraction = self.engine.progress
                status.update(f"{stage} ({fraction:.0%})" if 0 < fraction < 1 else stage)
                if stage != shown and not console.is_terminal:
                    console.print(f"vcli: {stage}", markup=False)
                shown = stage
                await asyncio.wait([loading, signalled], timeout=WATCH_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED)
        is_ready = loading.done() and loading.exception() is None
        loading.cancel()
        signalled.cancel()
        return is_ready and not self.signals

    async def _until_end(self) -> None:
        while self.engine.error is None and not self.signals:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._signalled.wait(), WATCH_INTERVAL_S)

    async def _drain(self) -> None:
        """No new requests; the open ones may finish, unless a second signal says otherwise."""
        timeout_s = self.plan.server.shutdown_timeout_s if self.signals else LAST_WORDS_S
        if self.signals and (num_open := self.service.admission.num_open):
            console.print(f"vcli: {num_open} open requests may finish within {format_seconds(timeout_s)}")
        draining = asyncio.create_task(self.service.admission.drain(timeout_s))
        hurrying = asyncio.create_task(self._hurry.wait())
        await asyncio.wait([draining, hurrying], return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        draining.cancel()

    def _on_signal(self, number: int) -> None:
        self.signals.append(number)
        self._signalled.set()
        if len(self.signals) > 1:
            self._hurry.set()

    def _report_restart(self, reason: str) -> None:
        num_open = self.engine.num_unfinished
        log.warning("%s; the engine starts again (%d unfinished sequences)", reason, num_open)

    def _report_conviction(self, state: RequestState, error: QuarantinedError) -> None:
        log.warning("refused from now on: %s: %s", describe(state), error)

    def _report(self) -> None:
        now, ready = time.time(), self.engine.ready
        assert ready is not None
        url = url_of(self.plan.listener, is_tls=self.service.certificate is not None)
        console.print(f"vcli {version()} serves {self.plan.model_name} on {url}", markup=False, style="bold")
        if self.plan.admin_listener is not None:
            url = url_of(self.plan.admin_listener, is_tls=self.service.certificate is not None)
            console.print(f"admin routes on {url}", markup=False)
        for line in capacity_report(ready):
            console.print(line, markup=False)
        console.print(f"ready in {format_seconds(now - process_start_time())}", markup=False)
        if self.plan.server.explain_startup:
            print_table("start-up", ["process", "stage", "from s", "took s"], self.engine.timeline.rows(now))


def capacity_report(ready: Ready) -> list[str]:
    """What the server can hold, in words."""
    num_tokens = ready.num_blocks * ready.block_size
    num_full = num_tokens / ready.max_model_len
    return [
        f"device {ready.device}, {ready.dtype}; up to {ready.max_num_seqs:,} requests run at once",
        f"KV cache holds {num_tokens:,} tokens: {num_full:,.1f} requests of the full {ready.max_model_len:,} tokens",
    ]


def _allow_many_connections() -> None:
    """Each client is an open file, and the usual soft limit of 1,024 of them is low for a server."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
