"""The engine without its process: requests in, steps, tokens out."""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait

from engine.batch import ScheduledBatch
from engine.config import BLOCK_SIZE, EngineConfig
from engine.grammar import GrammarError
from engine.grammar_compiler import CompiledGrammar
from engine.memory import device_memory, fragmentation
from engine.messages import AddRequest, EngineStats, Inspection, Ready, TokenOutput
from engine.scheduler import Scheduler
from engine.step_result import StepResult
from engine.worker import OnProgress, Worker

MAX_BLOCKS_SHOWN = 4096  # of an inspection: the state of as many is told within a millisecond
STEPS_PER_CAPTURE = 32  # while there is work: a graph takes as long to capture as several steps
COMPILE_POLL_S = 0.005  # between two looks at what else there is to do, of an engine that waits for a grammar


class EngineCore:
    """Owns the scheduler, the worker, and the steps in flight between them."""

    def __init__(
        self,
        config: EngineConfig,
        on_progress: OnProgress = lambda stage, fraction: None,
        *,
        leaves_graphs: bool = False,
    ) -> None:
        """leaves_graphs: CUDA graphs of less common sizes are left for `capture_next` and for later steps."""
        self.worker = worker = Worker(config, on_progress)
        self.clock = worker.clock
        self.batch = ScheduledBatch([], [])  # of the step launched last
        self.scheduler = Scheduler(
            num_blocks=worker.num_blocks,
            block_size=BLOCK_SIZE,
            max_model_len=worker.max_model_len,
            max_num_seqs=worker.max_num_seqs,
            max_num_batched_tokens=worker.max_num_batched_tokens,
            max_prefill_chunk=worker.max_prefill_chunk,
            target_itl_s=config.target_itl_s,
            enable_prefix_caching=config.enable_prefix_caching,
            policy=config.scheduling_policy,
            eos_token_ids=worker.model_config.eos_token_ids,
        )
        self.scheduler.stats.stage_seconds = self.clock.seconds
        self._look_for_host_tier()
        self.ready = Ready(
            max_model_len=worker.max_model_len,
            num_blocks=worker.num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=worker.max_num_seqs,
            max_prefill_chunk=worker.max_prefill_chunk,
            kv_cache_bytes=worker.kv_cache_bytes,
            hidden_size=worker.model_config.hidden_size,
            default_pooling=worker.model_config.default_pooling,
            vocab_size=worker.model_config.vocab_size,
            eos_token_ids=list(worker.model_config.eos_token_ids),
            device=str(worker.device),
            dtype=str(worker.dtype).removeprefix("torch."),
            default_sampling=dict(worker.model_config.default_sampling),
        )
        # A GPU works on one step while the host prepares the next; a CPU would only wait for itself.
        self.max_in_flight = 2 if worker.device.type == "cuda" else 1
        self._in_flight: deque[tuple[StepResult, ScheduledBatch, float]] = deque()  # with the time of the step's start
        self._last_end = 0.0  # of a step
        self._compiling: dict[str, tuple[AddRequest, Future[CompiledGrammar]]] = {}  # by request id
        while not leaves_graphs and self.capture_next():
            pass

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._compiling)

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.stats

    def add(self, request: AddRequest) -> None:
        """Queue a request; its tokens come out of later steps. One with a grammar first waits for that."""
        text, grammars = request.params.grammar, self.worker.grammars
        if text and (grammar := grammars.find(text)) is None:
            self._compiling[request.request_id] = (request, grammars.submit(text))
            self.scheduler.num_compiling = len(self._compiling)
        else:
            self.scheduler.add(request, grammar if text else None)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop requests; their blocks are free at once."""
        request_ids = list(request_ids)
        for request_id in request_ids:
            self._compiling.pop(request_id, None)
        self.scheduler.num_compiling = len(self._compiling)
        self.scheduler.abort(request_ids)

    def inspect(self) -> Inspection:
        """How blocks and memory are now."""
        blocks, stride = self.scheduler.pool.states(MAX_BLOCKS_SHOWN)
        device = self.worker.device
        return Inspection(blocks, stride, device_memory(device, self.worker.memory_kept), fragmentation(device))

    def capture_next(self) -> bool:
        """Capture one of the CUDA graphs that were left for later; False if there is none."""
        return self.worker.runner.capture_next()

    def step(self) -> list[TokenOutput]:
        """Launch a step, then take in the oldest one in flight once there are enough of them."""
        if self.stats.num_steps % STEPS_PER_CAPTURE == STEPS_PER_CAPTURE - 1 and self.worker.runner.wants_graph:
            self.capture_next()  # an engine that is never idle gets those that it needs, too
        refused = self._take_compiled() if self._compiling else []
        self.clock.enter("schedule")
        start = self.clock.since
        self._look_for_host_tier()
        batch = self.scheduler.schedule()
        result = self.worker.run(batch)
        if result is not None:
            self.batch = batch
            self._in_flight.append((result, batch, start))
        if not self._in_flight or (batch.requests and len(self._in_flight) < self.max_in_flight):
            return refused
        self.clock.enter("wait")
        result, batch, start = self._in_flight.popleft()
        drawn = result.wait()
        self.clock.enter("update")
        # A device begins with a step when it is launched, or when it has ended the one before.
        self.scheduler.note_time(batch, self.clock.since - max(start, self._last_end))
        self._last_end = self.clock.since
        return refused + self.scheduler.update(*drawn)

    def _take_compiled(self) -> list[TokenOutput]:
        """Queue the requests whose grammar is ready, and end those whose grammar is none."""
        if not self.scheduler.has_work:
            self.clock.enter("idle")
            wait([future for _, future in self._compiling.values()], COMPILE_POLL_S, FIRST_COMPLETED)
            self.clock.enter("schedule")
        refused = []
        for request_id, (request, future) in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[request_id]
            try:
                self.scheduler.add(request, future.result())
            except GrammarError as error:  # the front doors have tried it: only what they cannot see comes as far
                refused.append(TokenOutput(request_id, [], finish_reason="error", error=str(error)))
        self.scheduler.num_compiling = len(self._compiling)
        return refused

    def _look_for_host_tier(self) -> None:
        """Memory of the host is there some time after the start."""
        if self.scheduler.host_tier is None and self.worker.num_host_blocks:
            self.scheduler.add_host_tier(self.worker.num_host_blocks, self.worker.min_paged_in)
