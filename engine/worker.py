"""One device and all that lives on it: the weights, the KV cache, the running requests' rows."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from engine import kv_cache, ops
from engine.batch import NewRow, ScheduledBatch, ScheduledRequest
from engine.checkpoint import open_checkpoint
from engine.config import BLOCK_SIZE, EngineConfig
from engine.cuda_graphs import ALWAYS
from engine.errors import UserError
from engine.grammar_compiler import GrammarCompiler
from engine.host_cache import HostCache
from engine.hub import resolve_model
from engine.memory import weight_bytes
from engine.model_config import ModelConfig
from engine.model_runner import ModelRunner
from engine.models import build_model
from engine.quantization.at_load import find_format, schemes_of_layers
from engine.sampling_params import SamplingParams
from engine.step_clock import StepClock
from engine.step_result import StepResult
from engine.tokenizer import Tokenizer

CHUNK_UNIT = 512  # tokens: coarse, so that every start of a server on one machine comes to the same chunk
LONGEST_PAUSE_S = 0.045  # between two tokens of a stream, where prompts are computed beside many; the half beside few
FIXED_SHARE = 0.04  # of such a step, at most, that does not depend on how many tokens it computes

OnProgress = Callable[[str, float], None]


class Worker:
    """Loads a model onto its device, measures how many blocks fit, and runs batches."""

    def __init__(self, config: EngineConfig, on_progress: OnProgress) -> None:
        self.clock = StepClock()
        on_progress("finding the model", 0.0)
        path = resolve_model(config.model, config.revision)
        self.model_config = ModelConfig.from_path(path)
        self.grammars = GrammarCompiler(
            partial(_load_tokenizer, config, path), self.model_config.vocab_size, self.model_config.eos_token_ids
        )
        linear_format = find_format(self.model_config, config.quantization, path)
        if linear_format is not None and config.batch_invariant:
            raise UserError("--batch-invariant knows plain weights only: leave it out, or use the unquantized model")
        on_progress("starting the device", 0.0)
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.model_config.dtype, self.device)
        self.kv_dtype = torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else self.dtype
        ops.set_batch_invariant(self.device, config.batch_invariant)
        self._set_limits(config)

        longest = config.max_model_len or self.model_config.max_model_len
        on_progress("building the model", 0.0)
        self.model = build_model(self.model_config, self.dtype, self.device, max_model_len=longest)

        def on_bytes(done: int, total: int) -> None:
            on_progress("loading weights", done / max(total, 1))

        with ExitStack() as loading:
            ckpt = loading.enter_context(
                open_checkpoint(path, config.load_format, config.seed, on_bytes, linear_format)
            )
            self.model.load(ckpt)
            on_progress("compiling kernels", 0.0)
            schemes = schemes_of_layers(linear_format, self.model_config.num_layers) if linear_format else []
            ops.warm_up(self.device, self.dtype, self.kv_dtype, self.model_config, schemes)
            if self.device.type == "cpu":
                loading.close()  # it has no hands free, and its memory is known when the weights are in it
            # A GPU gets its weights meanwhile: what is measured depends on their shapes alone.
            on_progress("measuring memory", 0.0)
            self._allocate_cache(config, longest)
        if self.device.type == "cuda" and not config.enforce_eager:
            on_progress("capturing CUDA graphs", 0.0)
            self._capture_graphs(config)
        self.host_cache: HostCache | None = None
        self.min_paged_in = 1
        if config.host_kv_memory is not None:
            on_progress("measuring copies to the host", 0.0)
            self._set_up_host_cache(config.host_kv_memory)
        self.weight_bytes = weight_bytes(self.model)

    @property
    def graph_bytes(self) -> int:
        return sum(graphs.num_bytes for graphs in self.runner.graphs)

    @property
    def memory_kept(self) -> dict[str, int]:
        """Bytes of the device's memory that are set apart, by kind."""
        kept = {"weights": self.weight_bytes, "kv_cache": self.kv_cache_bytes}
        return kept | ({"cuda_graphs": self.graph_bytes} if self.graph_bytes else {})

    @property
    def num_host_blocks(self) -> int:
        """Blocks in memory of the host, once it is ready."""
        return self.host_cache.num_blocks if self.host_cache and self.host_cache.is_ready else 0

    def _set_limits(self, config: EngineConfig) -> None:
        """How much a step may hold. Raises UserError for limits that do not go together."""
        native_len = self.model_config.max_model_len
        if (config.max_model_len or 0) > native_len:
            raise UserError(
                f"--max-model-len {config.max_model_len:,} is more than the model's own {native_len:,} tokens"
            )
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens or (1024 if self.device.type == "cpu" else 8192)
        # On a CPU 256 tokens of a 135M model, which is what it takes beside few decodes, are a step of 100 ms.
        self.max_prefill_chunk = config.max_prefill_chunk or (512 if self.device.type == "cpu" else 2048)
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise UserError(
                f"--max-num-seqs {self.max_num_seqs:,} is more than --max-num-batched-tokens "
                f"{self.max_num_batched_tokens:,}: every running request needs a token of each step"
            )

    def _allocate_cache(self, config: EngineConfig, longest: int) -> None:
        """As many KV blocks as there is room for beside the weights and a step as large as any will be."""
        # A CPU has nothing to be measured: what the step would show is how much memory a GPU needs for it.
        is_known = self.device.type == "cpu" and config.kv_cache_memory is not None
        self.largest_batch_bytes = 0 if is_known else self._run_largest_batch(longest)
        attentions = self.model.attentions
        block_bytes = kv_cache.bytes_per_block(attentions, self.kv_dtype)
        self.num_blocks = kv_cache.num_blocks_that_fit(config, block_bytes, self.device, self.largest_batch_bytes)
        native_len = self.model_config.max_model_len
        self.max_model_len = kv_cache.fit_max_model_len(config, native_len, self.num_blocks, block_bytes)
        self.kv_cache_bytes = self.num_blocks * block_bytes
        self.kv_cache = kv_cache.allocate(attentions, self.num_blocks + 1, self.kv_dtype, self.device)
        self.runner = ModelRunner(
            self.model,
            self.device,
            self.max_num_seqs,
            self.max_model_len,
            self.num_blocks,
            self.clock,
            self.grammars,
        )

    def _capture_graphs(self, config: EngineConfig) -> None:
        """CUDA graphs and, unless it is given, the prefill chunk that their speed allows beside decodes."""
        fixed_s, per_token_s = self.runner.capture_graphs(self.max_num_batched_tokens)
        if config.max_prefill_chunk is None:
            self.max_prefill_chunk = prefill_chunk(fixed_s, per_token_s, self.max_num_batched_tokens)

    def _set_up_host_cache(self, num_bytes: int) -> None:
        """Memory of the host for blocks, if a block comes back from there sooner than it is computed again."""
        host_cache = HostCache(self.kv_cache, num_bytes)
        copy_s = host_cache.seconds_per_block()
        num_tokens = min(self.max_num_batched_tokens, self.max_prefill_chunk, self.max_model_len - 1)
        compute_s = self._seconds_of_step(num_tokens) / num_tokens * BLOCK_SIZE
        self.block_seconds = {"copied": copy_s, "computed": compute_s}
        if copy_s >= compute_s:
            print(
                f"vcli: engine: --host-kv-memory is not used: {BLOCK_SIZE} tokens take {copy_s * 1e6:,.0f} us to the "
                f"host and back, and {compute_s * 1e6:,.0f} us to be computed again",
                file=sys.stderr,
            )
            return
        # What comes back does so beside a step, which the request waits for.
        self.host_cache, self.min_paged_in = host_cache, math.ceil(self._seconds_of_step(1) / (compute_s - copy_s))
        host_cache.prepare()

    def _seconds_of_step(self, num_tokens: int) -> float:
        """How long a step of one prompt takes, of which nothing is left behind in use."""
        blocks = list(range(-(-num_tokens // BLOCK_SIZE)))
        row = NewRow(0, SamplingParams(temperature=0.0), [0] * num_tokens, num_tokens, blocks, [])
        batch = ScheduledBatch([row], [ScheduledRequest(0, 0, num_tokens, True, [])])
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            self.runner.run(batch).wait()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    def run(self, batch: ScheduledBatch) -> StepResult | None:
        """Begin a batch's copies and launch its step, if it has one; the result is waited for when it is needed."""
        if self.host_cache is not None:
            self.clock.enter("prepare")
            self.host_cache.copy(batch.paged_out, batch.paged_in)
        return self.runner.run(batch) if batch.requests else None

    def _run_largest_batch(self, longest: int) -> int:
        """Run a step as large as any will be; the bytes of GPU memory that it took beside weights and cache."""
        num_requests = min(self.max_num_seqs, self.max_num_batched_tokens)
        length = min(self.max_num_batched_tokens // num_requests, longest - 1)
        blocks_each = -(-length // BLOCK_SIZE)
        num_blocks = num_requests * blocks_each
        kv_cache.allocate(self.model.attentions, num_blocks, self.kv_dtype, self.device)
        params = SamplingParams(temperature=0.0 if self.device.type == "cpu" else 1.0, top_p=0.9)
        batch = ScheduledBatch([], [])
        for row in range(num_requests):
            blocks = list(range(row * blocks_each, (row + 1) * blocks_each))
            batch.new_rows.append(NewRow(row, params, [0] * length, length, blocks, []))
            batch.requests.append(ScheduledRequest(row, 0, length, True, []))
        runner = ModelRunner(self.model, self.device, num_requests, length + 1, num_blocks - 1, self.clock)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # loading had a peak of its own, and so had engines before this one
        runner.run(batch).wait()
        taken = 0
        if self.device.type == "cuda":
            taken = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        kv_cache.release(self.model.attentions)
        return taken


def prefill_chunk(fixed_s: float, per_token_s: float, most: int) -> int:
    """Tokens of a step beside many decodes: those of LONGEST_PAUSE_S, or more where FIXED_SHARE asks for them.

    fixed_s: what a step takes, whatever is in it. Measured on an H200, Llama 3.1 8B in int4, whose weights are made
    wide in each large step: 288 requests of 1,024 tokens in and 128 out take 11.1 s by 1,536 tokens, 8.9 s by 4,096.
    """
    in_time, worth_it = (LONGEST_PAUSE_S - fixed_s) / per_token_s, (1 / FIXED_SHARE - 1) * fixed_s / per_token_s
    worth_it = min(worth_it, 2 * ALWAYS)  # the half of which, beside few decodes, has a CUDA graph
    num_tokens = round(max(in_time, worth_it) / CHUNK_UNIT) * CHUNK_UNIT
    return min(max(num_tokens, CHUNK_UNIT), most)


def _load_tokenizer(config: EngineConfig, path: Path) -> Tokenizer | None:
    return None if config.skip_tokenizer_init else Tokenizer.load(config.tokenizer or str(path))


def pick_device(name: str) -> torch.device:
    """The device that --device names. Raises UserError when there is no such device."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here: check `nvidia-smi`, or use --device cpu")
    return torch.device("cuda", torch.cuda.current_device())


def pick_dtype(name: str, model_dtype: str, device: torch.device) -> torch.dtype:
    """The number type that --dtype names; auto is the model's own, but for float16 on a CPU, which has no fast path."""
    if name == "auto":
        name = "bfloat16" if (model_dtype, device.type) == ("float16", "cpu") else model_dtype
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype
