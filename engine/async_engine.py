"""The front door of the API process: submit a prompt, get an async stream of its tokens.

The engine runs in a process of its own. Its messages are decoded and turned into text on the link's thread, a whole
step at a time, and reach the event loop with one call, so that the loop never waits for either. What is known about a
request lives here, from `submit` until its last token or an abort: when the engine dies another one is started, and
gets every unfinished request with the tokens that it has given; its process stands by (standby.py). What always holds:
a stream loses no token, and none comes twice. The tokens that follow are those that would have come, as far as a result
does not depend on what else is in a batch: sampling is a function of seed and position. A request that ends engines is
found, and fails alone (quarantine.py).
"""

import asyncio
import contextlib
import dataclasses
import logging
import random
import secrets
import signal
import threading
import time
from collections.abc import Callable

from engine import messages
from engine.config import EngineConfig
from engine.errors import EngineDeadError, UserError
from engine.grammar_compiler import GrammarCompiler, import_llguidance
from engine.hub import resolve_model
from engine.intake import make_requests
from engine.link import EngineLink, describe_exit
from engine.outputs import OutputDelta, RequestState, RequestTimings
from engine.quarantine import Quarantine, QuarantinedError
from engine.request_stream import RequestStream
from engine.sampling_params import SamplingParams
from engine.standby import Standby
from engine.timeline import Timeline
from engine.tokenizer import Tokenizer

RESTART_WINDOW_S = 60.0  # in which an engine may die only so many times
RESTART_POLL_S = 0.02
INSPECTION_TIMEOUT_S = 0.25  # a step may take longer
LOADING_TIMEOUT_S = 120.0  # of silence, from an engine that loads what another one had loaded before
STANDBY_AFTER_S = 0.5  # the first requests go before it
FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)  # ends that no request brings about: operators, too little memory


log = logging.getLogger("vcli")


class AsyncEngine:
    """Owns the engine process and the requests in flight. All methods belong to the event loop's thread."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        link: EngineLink | None = None,
        timeline: Timeline | None = None,
        max_restarts: int = 3,
        step_timeout_s: float = 60.0,
    ) -> None:
        """link, timeline: of an engine process that was started already, and of what has happened so far.

        max_restarts: how often an engine that dies is replaced within a minute; then it is given up.
        step_timeout_s: an engine that has work and is silent for so long is taken for dead.
        """
        self.config = config
        self.progress: tuple[str, float] = ("starting", 0.0)
        self.timeline = timeline or Timeline()
        self.ready: messages.Ready | None = None  # set when requests can be submitted
        self.tokenizer: Tokenizer | None = None
        self._grammars: GrammarCompiler | None = None  # to refuse bad ones: the engine has its own
        self.error: str | None = None  # why the engine is dead
        self.stats = messages.EngineStats()
        self.inspection: messages.Inspection | None = None  # the last one
        self.detokenize_s = 0.0  # the time it has taken to make text and deltas of tokens, on the link's thread
        self.on_step: list[Callable[[messages.EngineStats], None]] = []  # called after each step, on the link's thread
        self.on_finish: list[Callable[[RequestTimings], None]] = []  # called on the loop, at each request's end
        self.on_restart: list[Callable[[str], None]] = []  # called on the loop, with why the engine died
        self.on_conviction: list[Callable[[RequestState, QuarantinedError], None]] = []  # called on the loop
        self.num_restarts = 0
        self.num_waiting_tokens = 0  # of the prompts whose first token has not come
        self._link = link
        self._standby = Standby()
        self._engine_ready: messages.Ready | None = None  # the engine's part of being ready
        self._is_restart_wanted = False
        self._has_served = False  # the engine at hand has come as far as running requests
        self._is_loaded = False  # this process's part
        self._failure: str | None = None  # the cause of an end that is about to be seen
        self._settled = asyncio.Event()  # ready or dead
        self._is_closing = False
        self._max_restarts = max_restarts
        self._recent_restarts: list[float] = []  # by time.monotonic()
        self._step_timeout_s = step_timeout_s
        self._loading_timeout_s = max(step_timeout_s, LOADING_TIMEOUT_S)
        self._last_sign = 0.0  # of life, or of new work, by time.monotonic()
        self._watch: asyncio.Task[None] | None = None
        self._start: messages.Start | None = None  # what the first engine was told
        self._seeds = random.Random(config.seed)
        self._sequences: dict[str, tuple[RequestStream, int]] = {}  # by the engine's request id; index among its n
        self._quarantine = Quarantine()
        self._inspected: asyncio.Event | None = None  # set when an inspection that is under way has come
        self._lock = threading.Lock()  # around what decides which of the sequences the engine has
        self._stats_before = messages.EngineStats()  # the counts of the engines that are gone

    async def start(self) -> None:
        """Start the engine and the loading of model and tokenizer, which goes on after this returns."""
        self._loop = asyncio.get_running_loop()
        self._link = self._link or EngineLink()
        self._link.open(self._on_messages, self._on_exit)
        self._watch = self._loop.create_task(self._watch_steps())
        self.timeline.begin("api", "loading the tokenizer")
        # Not the loop's own pool of threads: a download must not keep the process from ending.
        threading.Thread(target=self._load, args=[self._link], name="loading", daemon=True).start()

    async def wait_ready(self) -> None:
        """Return when requests can be submitted. Raises UserError if the engine died before."""
        await self._settled.wait()
        if self.error is not None:
            raise UserError(self.error)

    @property
    def is_restarting(self) -> bool:
        """Requests can be submitted, and wait for an engine that loads again, or for the trial of others."""
        return self.ready is not None and (self._engine_ready is None or self._quarantine.is_trying)

    @property
    def num_quarantined(self) -> int:
        """Requests that have ended the engine while they ran alone."""
        return self._quarantine.num_convicted

    @property
    def num_unfinished(self) -> int:
        """Sequences that wait for tokens."""
        return len(self._sequences)

    @property
    def open_requests(self) -> list[RequestState]:
        """Those that are not done."""
        return list(dict.fromkeys(stream.state for stream, _ in list(self._sequences.values())))

    @property
    def returncode(self) -> int | None:
        """The engine process's exit code, None while it runs."""
        return self._link.process.poll() if self._link else None

    def submit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str = "",
        prompt: str = "",
        priority: int = 0,
        cache_salt: str = "",
    ) -> RequestStream:
        """Send a request to the engine.

        Raises ValueError for one that cannot run, QuarantinedError for one like it ended the engine, EngineDeadError
        when none can.
        """
        if self.error is not None:
            raise EngineDeadError(self.error)
        if self.ready is None or self._link is None:
            raise RuntimeError("the model is still loading: wait for wait_ready()")
        engine_id = self._free_id(request_id, params.n)
        requests = make_requests(
            engine_id,
            prompt_token_ids,
            params,
            ready=self.ready,
            tokenizer=self.tokenizer,
            seeds=self._seeds,
            priority=priority,
            cache_salt=cache_salt,
        )
        self._quarantine.check(requests[0])
        if not self._sequences:
            self._last_sign = time.monotonic()
        state = RequestState(request_id or engine_id, prompt or None, requests, self.tokenizer)
        stream = RequestStream(state, on_start=self._leave_queue, on_abort=self._abort)
        self.num_waiting_tokens += state.timings.num_prompt_tokens
        with self._lock:
            for index, request in enumerate(requests):
                self._sequences[request.request_id] = (stream, index)
                if not self._quarantine.is_trying:  # else it waits here
                    self._link.send(request)
        return stream

    async def check_grammar(self, text: str) -> None:
        """To be awaited before a request with a grammar is submitted. Raises GrammarError for one that is none."""
        if self.ready is None:
            raise RuntimeError("the model is still loading: wait for wait_ready()")
        if self._grammars is None:
            self._grammars = GrammarCompiler(lambda: self.tokenizer, self.ready.vocab_size, self.ready.eos_token_ids)
        if self._grammars.find(text) is None:
            await asyncio.wrap_future(self._grammars.submit(text))

    async def restart(self) -> None:
        """Put another engine in this one's place, which goes on with every unfinished request; return when it serves.

        Raises EngineDeadError when none can be had, RuntimeError while one is loading already.
        """
        if self.error is None and (self._engine_ready is None or self._link is None):
            raise RuntimeError("an engine is loading already")
        if self.error is None and self._link is not None:
            self._is_restart_wanted, self._engine_ready = True, None
            self._link.kill()  # as after a crash: what it has not said yet, the next one says
        while self.error is None and self._engine_ready is None:
            await asyncio.sleep(RESTART_POLL_S)
        if self.error is not None:
            raise EngineDeadError(self.error)

    async def inspect(self, timeout_s: float = INSPECTION_TIMEOUT_S) -> messages.Inspection | None:
        """The engine's blocks and memory: as they are now, or as they were last when it does not answer in time.

        Costs the engine a millisecond; who asks while another one does gets the same answer. None before the first.
        """
        if self._engine_ready is not None and self._link is not None:
            if self._inspected is None:
                self._inspected = asyncio.Event()
                self._link.send(messages.Inspect())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._inspected.wait(), timeout_s)
        return self.inspection

    async def shutdown(self) -> None:
        """End the engine; streams still open end with EngineDeadError."""
        if self._link is None:
            return
        self._is_closing = True
        if self._watch is not None:
            self._watch.cancel()
        self._failure = self._failure or "the engine was shut down"
        wait_s = 5.0 if self.ready else 0.0  # an engine that loads its model hears nothing
        await asyncio.to_thread(self._standby.close)
        await asyncio.to_thread(self._link.close, wait_s)

    def _free_id(self, request_id: str, n: int) -> str:
        """Two clients may choose the same id at the same time; the engine sees two."""
        free = request_id or secrets.token_hex(8)
        while free in self._sequences or any(f"{free}-{index}" in self._sequences for index in range(n)):
            free = f"{request_id}.{secrets.token_hex(4)}"
        return free

    def _leave_queue(self, stream: RequestStream) -> None:
        self.num_waiting_tokens -= stream.state.timings.num_prompt_tokens

    def _abort(self, stream: RequestStream) -> None:
        num_aborted = self._drop(stream)
        stream.state.timings.finish_reasons += ["abort"] * num_aborted
        self._finished(stream)

    def _drop(self, stream: RequestStream) -> int:
        """Forget a request, here and in the engine; how many of its sequences were still running."""
        with self._lock:
            running = self._forget(stream)
            if running and stream.state is self._quarantine.on_trial:
                self._end_trial()
        return len(running)

    def _forget(self, stream: RequestStream) -> list[str]:
        """Take a request's sequences from here and from the engine; the engine's ids of those that were running."""
        request_ids = [sequence.request.request_id for sequence in stream.state.sequences]
        running = [request_id for request_id in request_ids if self._sequences.pop(request_id, None)]
        if running and self._link is not None:
            self._link.send(messages.Abort(running))
        return running

    def _end_trial(self) -> None:
        """Everybody goes on, unless there are others to be tried: they come when the engine has nothing."""
        self._quarantine.acquit()
        if not self._quarantine.is_between:
            self._send_unfinished()

    def _send_unfinished(self) -> None:
        """Give an engine that has nothing the request that must run alone, or else all of them."""
        assert self._link is not None
        on_trial = self._quarantine.on_trial
        for stream, index in self._unfinished():
            if on_trial in (None, stream.state):
                stream.state.num_tokens_at_start = stream.state.timings.num_output_tokens
                self._link.send(stream.state.sequences[index].unfinished_request())

    def _unfinished(self) -> list[tuple[RequestStream, int]]:
        """The sequences, in the order in which the engine serves them."""

        def order(entry: tuple[RequestStream, int]) -> tuple[int, float]:
            stream, index = entry
            request = stream.state.sequences[index].request
            return request.priority if self.config.scheduling_policy == "priority" else 0, request.arrival_time

        return sorted(self._sequences.values(), key=order)

    def _maybe_running(self) -> list[tuple[RequestStream, int]]:
        """The sequences that were in the engine's running batch, and others if it was smaller than it may be."""
        assert self.ready is not None
        return [
            (stream, index)
            for place, (stream, index) in enumerate(self._unfinished())
            if place < self.ready.max_num_seqs or stream.state.sequences[index].token_ids
        ]

    def _finished(self, stream: RequestStream) -> None:
        for callback in self.on_finish:
            callback(stream.state.timings)

    # On the loading thread.

    def _load(self, link: EngineLink) -> None:
        """Find the model (once, here: the engine gets a path) and, while the engine loads it, load the tokenizer."""
        try:
            path = str(resolve_model(self.config.model, self.config.revision))
            self._start = messages.Start(dataclasses.asdict(dataclasses.replace(self.config, model=path)))
            link.send(self._start)
            tokenizer = None if self.config.skip_tokenizer_init else Tokenizer.load(self.config.tokenizer or path)
            import_llguidance()
        except UserError as error:
            self._call_on_loop(self._fail, str(error))
        except Exception as error:
            log.exception("loading fails")
            self._call_on_loop(self._fail, f"loading failed: {type(error).__name__}: {error}")
        else:
            self._call_on_loop(self._on_tokenizer, tokenizer)

    def _call_on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is waiting
            self._loop.call_soon_threadsafe(call, *arguments)

    # On the link's thread.

    def _on_messages(self, received: list[messages.FromEngine]) -> None:
        self._last_sign = time.monotonic()
        deltas: dict[RequestStream, list[OutputDelta]] = {}
        controls: list[messages.FromEngine] = []
        for message in received:
            if isinstance(message, messages.StepOutput):
                start = time.perf_counter()
                self._take(message.outputs, deltas)
                self.detokenize_s += time.perf_counter() - start
                self._go_on_trying(message.stats)
                message.stats.count_on(self._stats_before)
                if message.stats.num_steps > self.stats.num_steps:
                    for callback in self.on_step:
                        callback(message.stats)
                self.stats = message.stats
            else:
                controls.append(message)
        self._loop.call_soon_threadsafe(self._deliver, deltas, controls)

    def _take(self, outputs: list[messages.TokenOutput], deltas: dict[RequestStream, list[OutputDelta]]) -> None:
        """Turn one step's tokens into text. A sequence that met its stop string is taken from the engine."""
        now = time.monotonic()
        stopped = []
        for output in outputs:
            stream, index = self._sequences.get(output.request_id, (None, 0))
            if stream is None:
                continue  # aborted while its tokens were on the way
            try:
                delta = stream.state.take(index, output, now)
            except Exception as error:  # one request that cannot be turned into text must not end the others
                log.exception("a request's tokens cannot be made into text")
                self._drop(stream)
                self._loop.call_soon_threadsafe(self._end_alone, stream, error)
                continue
            if delta.finish_reason == "error":
                self._drop(stream)
                failure = stream.state.sequences[index].failure(output)
                self._loop.call_soon_threadsafe(self._end_alone, stream, failure)
                continue
            deltas.setdefault(stream, []).append(delta)
            if delta.finish_reason is not None:
                self._sequences.pop(output.request_id, None)
                if output.finish_reason is None:
                    stopped.append(output.request_id)
        if stopped and self._link is not None:
            self._link.send(messages.Abort(stopped))

    def _go_on_trying(self, stats: messages.EngineStats) -> None:
        """Of trials: who has passed makes way, and comes again with the others; to an empty engine comes the next."""
        if not self._quarantine.is_trying:
            return
        with self._lock:
            if self._quarantine.is_passed:
                self._withdraw(self._quarantine.on_trial)
                self._end_trial()
            if self._quarantine.is_between and not (stats.num_running or stats.num_waiting):
                self._quarantine.try_next({stream.state for stream, _ in list(self._sequences.values())})
                self._send_unfinished()

    def _withdraw(self, state: RequestState | None) -> None:
        """Take a request from the engine that goes on later, under other ids: what the engine gave since is lost."""
        entries = {name: entry for name, entry in list(self._sequences.items()) if entry[0].state is state}
        if state is None or not entries or self._link is None:
            return
        self._link.send(messages.Abort(list(entries)))
        state.rename()
        for name, (stream, index) in entries.items():
            del self._sequences[name]
            self._sequences[state.sequences[index].request.request_id] = (stream, index)

    def _on_exit(self, returncode: int) -> None:
        self._call_on_loop(self._end, returncode)

    # On the loop.

    def _deliver(self, deltas: dict[RequestStream, list[OutputDelta]], controls: list[messages.FromEngine]) -> None:
        for stream, gained in deltas.items():
            if stream.deliver(gained):
                self._finished(stream)
        for message in controls:
            if isinstance(message, messages.Progress):
                self.progress = (message.stage, message.fraction)
                if self.ready is None:
                    self.timeline.begin("engine", message.stage, message.time)
            elif isinstance(message, messages.Ready):
                self._engine_ready, self._has_served = message, True
                self._loop.call_later(STANDBY_AFTER_S, self._start_standby)
                if self._quarantine.is_trying:
                    self.progress = ("trying requests one by one", 0.0)
                if not self._is_loaded:
                    self.progress = ("loading the tokenizer", 0.0)
                    self.timeline.begin("engine", "ready")
                self._settle()
            elif isinstance(message, messages.Inspection):
                self.inspection = message
                self._end_inspection()
            elif isinstance(message, messages.Failed):
                self._failure = message.error

    def _end_inspection(self) -> None:
        """An inspection has come, or will not come any more."""
        if self._inspected is not None:
            self._inspected.set()
            self._inspected = None

    def _end_alone(self, stream: RequestStream, error: Exception) -> None:
        """A request has failed and is dropped; nobody else is concerned."""
        if stream.is_finished:
            return  # aborted meanwhile
        stream.fail(error)
        reasons = stream.state.timings.finish_reasons
        reasons += ["error"] * (len(stream.state.sequences) - len(reasons))
        self._finished(stream)

    def _on_tokenizer(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._is_loaded = True
        self.timeline.begin("api", "waiting for the engine")
        self._settle()

    def _settle(self) -> None:
        if self._engine_ready is not None and self._is_loaded and self.error is None:
            self.ready = self._engine_ready
            self._settled.set()

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        if self._link is not None:
            self._link.kill()

    def _end(self, returncode: int) -> None:
        is_wanted, self._is_restart_wanted = self._is_restart_wanted, False
        is_by_itself = not is_wanted and (self._failure is not None or returncode not in FROM_OUTSIDE)
        reason, self._failure = self._failure or describe_exit(returncode), None
        now = time.monotonic()
        self._recent_restarts = [moment for moment in self._recent_restarts if now - moment < RESTART_WINDOW_S]
        if self.ready is None or self._is_closing:
            self._die(reason)
        elif is_wanted:
            self._restart("a restart was asked for")
        elif is_by_itself and self._has_served and self._quarantine.on_trial is not None:
            self._convict(reason)
            self._restart(reason)
        elif len(self._recent_restarts) >= self._max_restarts:
            self._die(reason)
        else:
            self._recent_restarts.append(now)
            if is_by_itself and self._has_served:
                self._quarantine.accuse(dict.fromkeys(stream.state for stream, _ in self._maybe_running()))
            self._restart(reason)

    def _convict(self, reason: str) -> None:
        """End the request on trial, and those that are the same; the engine's end was theirs and nobody else's."""
        error = self._quarantine.convict(reason)
        for stream in dict.fromkeys(stream for stream, _ in self._unfinished()):
            if self._quarantine.is_refused(stream.state.sequences[0].request):
                self._forget(stream)
                self._end_alone(stream, error)
                for callback in self.on_conviction:
                    callback(stream.state, error)

    async def _watch_steps(self) -> None:
        """End an engine that has work and makes no step, or loads again and does not get on; another one takes over."""
        while True:
            await asyncio.sleep(self._step_timeout_s / 10)
            silence_s = time.monotonic() - self._last_sign
            if self.ready is not None and self._engine_ready is None and silence_s > self._loading_timeout_s:
                self._fail(f"the engine said nothing for {silence_s:.0f} s while it was loading again")
                self._last_sign = time.monotonic()
            if self._sequences and self._engine_ready is not None and silence_s > self._step_timeout_s:
                self._fail(f"the engine made no step for {silence_s:.0f} s")
                self._engine_ready = None

    def _restart(self, reason: str) -> None:
        """Start another engine, and have it go on with every unfinished request."""
        assert self._link is not None
        self.num_restarts += 1
        self.progress = ("starting again", 0.0)
        self._last_sign = time.monotonic()
        self.stats = self._stats_before = self.stats.counts()
        self._engine_ready, self._has_served = None, False
        self._end_inspection()
        self._link = self._standby.take(self._link.command)
        self._link.open(self._on_messages, self._on_exit)
        self._link.send(self._next_start())
        self._quarantine.begin(dict.fromkeys(stream.state for stream, _ in self._unfinished()))
        self._send_unfinished()
        for callback in self.on_restart:
            callback(reason)

    def _start_standby(self) -> None:
        if self._link is not None and self._max_restarts > 0 and not self._is_closing:
            self._standby.start(self._link.command)

    def _next_start(self) -> messages.Start:
        """What an engine is told that takes over: what the first one measured holds, as the requests rely on it."""
        assert self._start is not None
        assert self.ready is not None
        measured = {
            "max_model_len": self.ready.max_model_len,
            "max_prefill_chunk": self.ready.max_prefill_chunk,
            "kv_cache_memory": self.ready.kv_cache_bytes,
        }
        return messages.Start(self._start.config | {name: value for name, value in measured.items() if value})

    def _die(self, reason: str) -> None:
        self.error = reason
        self._settled.set()
        open_streams = dict.fromkeys(stream for stream, _ in self._sequences.values())
        self._sequences.clear()
        for stream in open_streams:
            stream.fail(EngineDeadError(self.error))
