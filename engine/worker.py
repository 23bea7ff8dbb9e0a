"""One device and all that lives on it: the weights, the KV cache, the running requests' rows."""

from collections.abc import Callable

import torch

from engine import kv_cache
from engine.batch import NewRow, ScheduledBatch, ScheduledRequest
from engine.checkpoint import open_checkpoint
from engine.config import BLOCK_SIZE, EngineConfig
from engine.errors import UserError
from engine.hub import resolve_model
from engine.model_config import ModelConfig
from engine.model_runner import ModelRunner, StepResult
from engine.models import build_model
from engine.sampling_params import SamplingParams

OnProgress = Callable[[str, float], None]


class Worker:
    """Loads a model onto its device, measures how many blocks fit, and runs batches."""

    def __init__(self, config: EngineConfig, on_progress: OnProgress) -> None:
        on_progress("finding the model", 0.0)
        path = resolve_model(config.model, config.revision)
        self.model_config = ModelConfig.from_path(path)
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.model_config.dtype, self.device)
        native_len = self.model_config.max_model_len
        if (config.max_model_len or 0) > native_len:
            raise UserError(
                f"--max-model-len {config.max_model_len:,} is more than the model's own {native_len:,} tokens"
            )
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens or (1024 if self.device.type == "cpu" else 8192)
        # On an H200 a step with a chunk of 1k tokens of an 8B model takes 20 ms, on a CPU 256 of a 135M model 100 ms.
        self.max_prefill_chunk = config.max_prefill_chunk or (256 if self.device.type == "cpu" else 1024)
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise UserError(
                f"--max-num-seqs {self.max_num_seqs:,} is more than --max-num-batched-tokens "
                f"{self.max_num_batched_tokens:,}: every running request needs a token of each step"
            )

        on_progress("loading weights", 0.0)
        longest = config.max_model_len or native_len
        self.model = build_model(self.model_config, self.dtype, self.device, max_model_len=longest)
        self.model.load(
            open_checkpoint(
                path,
                load_format=config.load_format,
                seed=config.seed,
                on_progress=lambda done, total: on_progress("loading weights", done / max(total, 1)),
            )
        )
        on_progress("measuring memory", 0.0)
        attentions = self.model.attentions
        block_bytes = kv_cache.bytes_per_block(attentions, self.dtype)
        runner = ModelRunner(self.model, self.device, self.max_num_seqs, longest)
        self._run_largest_batch(runner)
        self.num_blocks = kv_cache.num_blocks_that_fit(config, block_bytes, self.device)
        self.max_model_len = kv_cache.fit_max_model_len(config, native_len, self.num_blocks, block_bytes)
        kv_cache.allocate(attentions, self.num_blocks, self.dtype, self.device)
        self.runner = ModelRunner(self.model, self.device, self.max_num_seqs, self.max_model_len)

    def run(self, batch: ScheduledBatch) -> StepResult:
        """Launch one step; the result is waited for when it is needed."""
        return self.runner.run(batch)

    def _run_largest_batch(self, runner: ModelRunner) -> None:
        """A step as large as any will be, so that the memory it takes is taken when the free rest is measured."""
        num_requests = min(self.max_num_seqs, self.max_num_batched_tokens)
        length = min(self.max_num_batched_tokens // num_requests, runner.token_ids.shape[1] - 1)
        blocks_each = -(-length // BLOCK_SIZE)
        kv_cache.allocate(self.model.attentions, num_requests * blocks_each, self.dtype, self.device)
        params = SamplingParams(temperature=0.0 if self.device.type == "cpu" else 1.0, top_p=0.9)
        batch = ScheduledBatch([], [])
        for row in range(num_requests):
            blocks = list(range(row * blocks_each, (row + 1) * blocks_each))
            batch.new_rows.append(NewRow(row, params, [0] * length, length, blocks, []))
            batch.requests.append(ScheduledRequest(row, 0, length, True, []))
        runner.run(batch).wait()


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
