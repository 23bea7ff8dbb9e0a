"""One checkpoint run as it is served, and what is kept of it to hold it against another.

The engine runs in this process, does all there is to do, and is let go but for what makes logits of hidden states: so
two checkpoints never share the memory, however large they are.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from bench import throughput
from bench.free_memory import free_memory
from bench.workloads import BenchRequest, random_requests
from engine.batch import ForwardBatch
from engine.config import BLOCK_SIZE, EngineConfig
from engine.core import EngineCore
from engine.errors import UserError
from engine.hub import resolve_model
from engine.memory import weight_bytes
from engine.models.decoder import DecoderLayer

LAYER_TOKENS = 256  # of the text, on which layers are compared
DECODE_BATCHES = (1, 16, 64)
PREFIX_LEN = 2 * BLOCK_SIZE  # of the requests that decode
DECODE_STEPS, TRIAL_STEPS = 24, 4
PREFILL_INPUT_LEN, PREFILL_REPEATS = 512, 3
SLOW_S = 5.0  # where decoding would take longer, a trial has to do, and no prefill is repeated after it


@dataclass(frozen=True)
class State:
    """The residual stream between two layers as the next one finds it, to be added up: [tokens, hidden_size] both."""

    x: Tensor
    residual: Tensor

    @property
    def stream(self) -> Tensor:
        return self.x.float() + self.residual.float()


@dataclass(frozen=True)
class Observation:
    """What is kept of a checkpoint. Tensors are on the CPU, but for those that `logits` multiplies with."""

    name: str
    vocab_size: int
    logits: Callable[[Tensor], Tensor]  # [n, vocab_size] float32 of last hidden states [n, hidden_size]
    hidden: Tensor  # [windows, length, hidden_size], the last hidden states of the text
    states: list[State]  # of the text's first tokens: what comes into the first layer, and out of each
    replayed: list[State]  # the same when each layer gets what it got in the other checkpoint; []: it does not fit
    weight_bytes: int
    file_bytes: int | None
    tokens_per_s: dict[str, float | None]
    device: str
    dtype: str


def broken(name: str) -> UserError:
    return UserError(f"{name} makes logits of the text that are no numbers: its weights are broken")


def observe(
    engine: EngineConfig,
    windows: Tensor,
    on_progress: Callable[[str, float], None],
    given: list[State] | None = None,
) -> Observation:
    """Run the windows [windows, length] of a text through a checkpoint, and time it. given: states of the other one.

    Raises UserError, as starting an engine does, and for weights that make no numbers.
    """
    path = resolve_model(engine.model, engine.revision)
    name = path.stem if path.is_file() else path.name
    core = EngineCore(replace(engine, model=str(path), skip_tokenizer_init=True), on_progress)
    model, ready, length = core.worker.model, core.ready, windows.shape[1]
    if ready.max_model_len < length:
        raise UserError(
            f"the KV cache holds {ready.max_model_len:,} tokens, a window of the text has {length:,}: "
            "give it more memory, or lower --max-model-len"
        )
    hidden = []
    for i, window in enumerate(windows):
        on_progress("reading the text", i / len(windows))
        hidden.append(torch.cat([chunk.cpu() for chunk in last_hidden_states(core, window)]))
    with torch.inference_mode():
        if not model.logits(hidden[0][-1:].to(core.worker.device)).isfinite().all():
            raise broken(name)  # and not a sentence of what runs next
    first_tokens = windows[0, :LAYER_TOKENS]
    states = layer_states(core, first_tokens)
    is_alike = given is not None and [state.x.shape for state in given] == [state.x.shape for state in states]
    replayed = layer_states(core, first_tokens, given) if is_alike else []
    tokens_per_s = measure_speed(core, on_progress)
    num_bytes = weight_bytes(model)
    del core
    model.layers.clear()  # and the KV cache with them
    free_memory()
    return Observation(
        name=name,
        vocab_size=ready.vocab_size,
        logits=model.logits,
        hidden=torch.stack(hidden),
        states=states,
        replayed=replayed,
        weight_bytes=num_bytes,
        file_bytes=file_bytes(path) if engine.load_format == "auto" else None,
        tokens_per_s=tokens_per_s,
        device=ready.device,
        dtype=ready.dtype,
    )


@torch.inference_mode()
def last_hidden_states(core: EngineCore, token_ids: Tensor) -> Iterator[Tensor]:
    """[n, hidden_size] of the tokens [T] of one sequence, in chunks as they are served.

    Keys and values go to the first blocks of the cache: no request may have been served before.
    """
    worker, device = core.worker, core.worker.device
    token_ids = token_ids.to(device)
    block_table = torch.arange(-(-len(token_ids) // BLOCK_SIZE), dtype=torch.int32, device=device).unsqueeze(0)
    for start in range(0, len(token_ids), worker.max_num_batched_tokens):
        end = min(start + worker.max_num_batched_tokens, len(token_ids))
        positions = torch.arange(start, end, dtype=torch.int32, device=device)
        batch = ForwardBatch(
            token_ids=token_ids[start:end],
            positions=positions,
            slot_mapping=positions,
            query_start=torch.tensor([0, end - start], dtype=torch.int32, device=device),
            context_lens=torch.tensor([end], dtype=torch.int32, device=device),
            rows=torch.zeros(1, dtype=torch.int32, device=device),
            block_table=block_table,
            num_decodes=int(end - start == 1),
            max_query_len=end - start,
            max_context_len=end,
        )
        yield worker.model.forward(batch)


def layer_states(core: EngineCore, token_ids: Tensor, given: list[State] | None = None) -> list[State]:
    """What comes into the first layer and out of each, of the first chunk of a sequence [T].

    given: what each layer gets, instead of what the one before it made.
    """
    model, layers = core.worker.model, core.worker.model.layers
    states: list[State] = []
    taps = [_Tap(layer, states, given[i] if given else None) for i, layer in enumerate(layers)]
    model.layers = cast(list[DecoderLayer], taps)
    try:
        next(last_hidden_states(core, token_ids[: core.worker.max_num_batched_tokens]))
    finally:
        model.layers = layers
    return states


class _Tap:
    """A layer that keeps what comes out of it: as much of one as a forward pass needs."""

    def __init__(self, layer: DecoderLayer, states: list[State], given: State | None) -> None:
        self.layer, self.states, self.given = layer, states, given

    def attend(self, x: Tensor, residual: Tensor, batch: ForwardBatch) -> Tensor:
        if self.given is not None:
            x = self.given.x.to(x)
            residual.copy_(self.given.residual)
        if not self.states:
            self._keep(x, residual)
        return self.layer.attend(x, residual, batch)

    def transform(self, heads: Tensor, residual: Tensor) -> Tensor:
        x = self.layer.transform(heads, residual)
        self._keep(x, residual)
        return x

    def _keep(self, x: Tensor, residual: Tensor) -> None:
        self.states.append(State(x.to("cpu", copy=True), residual.to("cpu", copy=True)))


def measure_speed(core: EngineCore, on_progress: Callable[[str, float], None]) -> dict[str, float | None]:
    """Tokens per second of decode_1, decode_16, decode_64 and prefill; None where the engine has no room for it."""
    rates: dict[str, float | None] = {}
    for i, batch in enumerate(DECODE_BATCHES):
        on_progress("measuring speed", i / (len(DECODE_BATCHES) + 1))
        rates[f"decode_{batch}"] = _decode_rate(core, batch)
    on_progress("measuring speed", 1 - 1 / (len(DECODE_BATCHES) + 1))
    return rates | {"prefill": _prefill_rate(core)}


def _decode_rate(core: EngineCore, batch: int) -> float | None:
    """Of the median step that decodes a full batch."""
    tokens_each = PREFIX_LEN + 1 + DECODE_STEPS
    blocks = batch * -(-tokens_each // BLOCK_SIZE)
    if core.ready.max_model_len < tokens_each or core.ready.max_num_seqs < batch or core.ready.num_blocks < blocks:
        return None
    seconds = _decode(core, batch, TRIAL_STEPS)
    if sum(seconds) * DECODE_STEPS / TRIAL_STEPS < SLOW_S:
        seconds = _decode(core, batch, DECODE_STEPS)
    return batch / statistics.median(seconds)


def _decode(core: EngineCore, batch: int, num_steps: int) -> list[float]:
    """How long steps take that decode requests of one prefix, which is in the cache, and a token of their own."""
    token_ids = np.random.default_rng(0).integers(0, core.ready.vocab_size, PREFIX_LEN + batch).tolist()
    prefix, own = token_ids[:PREFIX_LEN], token_ids[PREFIX_LEN:]
    throughput.measure(core, [BenchRequest(1, prefix)])
    requests = [BenchRequest(num_steps + 1, [*prefix, token_id]) for token_id in own]
    return [step.seconds for step in throughput.decode_steps(throughput.measure(core, requests), batch)]


def _prefill_rate(core: EngineCore) -> float:
    """Of the median run of as many prompts as a step has room for."""
    input_len = min(PREFILL_INPUT_LEN, core.ready.max_model_len - 1)
    num_prompts = max(core.worker.max_num_batched_tokens // input_len, 1)
    runs: list[float] = []
    while len(runs) < PREFILL_REPEATS and sum(runs) < SLOW_S:
        vocab_size, seed = core.ready.vocab_size, len(runs) + 1  # other prompts each time: none is in the cache
        requests = random_requests(num_prompts, input_len=input_len, output_len=1, vocab_size=vocab_size, seed=seed)
        runs.append(sum(step.seconds for step in throughput.measure(core, requests)))
    return num_prompts * input_len / statistics.median(runs)


def file_bytes(path: Path) -> int:
    """What the files take that the weights lie in."""
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)
