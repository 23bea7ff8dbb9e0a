"""A model is walked part by part: the embedding, each layer, the last norm and head. One part is in memory at a time.

All samples of the calibration text go through a layer at once, and each of its linear layers is solved at the moment
its inputs arrive: an observer stands in for its weight, and puts the quantized one there before it answers. So whatever
comes later, in this layer and in those after it, sees the errors made before. Rounding to nearest looks at no text and
runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine import kv_cache
from engine.batch import ForwardBatch
from engine.checkpoint import Reads, Source, StoredCheckpoint, open_checkpoint
from engine.config import BLOCK_SIZE
from engine.errors import UserError
from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.layers.weights import PlainWeight, Weight
from engine.model_config import ModelConfig
from engine.models import Model, build_model
from engine.models.decoder import DecoderLayer
from engine.parallel.groups import Group
from engine.quantization.formats import Format
from engine.quantization.recipe import NUM_SAMPLES, SEQ_LEN, Recipe
from engine.quantization.solvers.gptq import gptq
from engine.quantization.solvers.inputs import Inputs, output_error
from engine.quantization.weight import QuantizedWeight, Scheme, round_to_grid, round_to_nearest
from engine.safetensors import SafetensorsFolder
from engine.tokenizer import Tokenizer

CHUNK_ROWS = 4096  # tokens of a gated product at a time: what it makes in between is twice as wide as its result
UNUSED = ("rotary_emb.inv_freq",)  # in old checkpoints, and worked out by everybody who reads them


def sample_tokens(tokenizer: Tokenizer, text: str, recipe: Recipe) -> Tensor:
    """[samples, seq_len] token ids: pieces from all over the text, each begun as the tokenizer begins a prompt.

    Fewer samples if the text has no more. Raises UserError if it has not even one.
    """
    seq_len = recipe.seq_len or SEQ_LEN
    begin = tokenizer.encode("")
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    length = seq_len - len(begin)
    num_pieces = len(token_ids) // length if length > 0 else 0
    if not num_pieces:
        raise UserError(
            f"the calibration text has {len(token_ids):,} tokens, fewer than one sample of {seq_len:,}: "
            "give a longer --calibration, or a smaller --seq-len"
        )
    num_samples = min(recipe.samples or NUM_SAMPLES, num_pieces)
    starts = [i * num_pieces // num_samples * length for i in range(num_samples)]
    return torch.tensor([begin + token_ids[start : start + length] for start in starts], dtype=torch.int32)


@dataclass(frozen=True)
class ReadTensor:
    """A tensor of the checkpoint, or some of its rows, and where it went."""

    name: str
    into: Tensor
    plus: float


@dataclass(frozen=True)
class NotingCheckpoint(StoredCheckpoint):
    """Notes all that is read from it."""

    noted: list[ReadTensor] = field(default_factory=list)

    def read(
        self,
        name: str,
        into: Tensor,
        dim: int | None = None,
        group: Group | None = None,
        fused: tuple[int, int] | None = None,
        plus: float = 0.0,
    ) -> None:
        self.noted.append(ReadTensor(self.prefix + name, into, plus))
        super().read(name, into, dim, group, fused, plus)


class _NoReads(Reads):
    """Names and shapes are looked at, and nothing is read."""

    def submit(self, jobs: object) -> None:
        pass


@dataclass(frozen=True)
class Product:
    """A linear layer of ours, and the rows of its weight that each linear layer of the checkpoint has."""

    linear: ColumnParallelLinear | RowParallelLinear
    weight: Tensor  # [out, in], as it was loaded
    rows: dict[str, slice]  # by name, as model.layers.0.self_attn.q_proj

    def shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each layer."""
        return {name: (rows.stop - rows.start, self.weight.shape[1]) for name, rows in self.rows.items()}


def products(layer: DecoderLayer, noted: list[ReadTensor]) -> Iterator[Product]:
    """Those of a layer, given what was read when it was loaded."""
    for linear in (*vars(layer.attention).values(), *vars(layer.mlp).values()):
        if isinstance(linear, ColumnParallelLinear | RowParallelLinear):
            names = (
                (linear.stored.name,) if isinstance(linear, RowParallelLinear) else (*linear.parts, linear.fused_name)
            )
            assert isinstance(linear.weight, PlainWeight), "what is quantized is not quantized yet"
            yield Product(linear, linear.weight.tensor, _rows(names, noted))


def _rows(names: tuple[str, ...], noted: list[ReadTensor]) -> dict[str, slice]:
    rows: dict[str, slice] = {}
    end = 0
    for read in noted:
        name, _, kind = read.name.rpartition(".")
        if kind == "weight" and name.rpartition(".")[2] in names:
            start = rows[name].start if name in rows else end
            end += len(read.into)
            rows[name] = slice(start, end)
    return rows


@dataclass(frozen=True)
class Listing:
    """What a checkpoint holds."""

    products: list[dict[str, tuple[int, int]]]  # the linear layers of each, [out, in] by name
    num_numbers: int  # in all tensors


def list_tensors(source: Path, config: ModelConfig) -> Listing:
    """Raises UserError for a checkpoint that is not what its config says, or holds layers that are not ours."""
    model = build_model(config, torch.float32, torch.device("meta"))
    all_noted: list[ReadTensor] = []
    found: list[dict[str, tuple[int, int]]] = []
    with open_checkpoint(source) as ckpt:
        assert isinstance(ckpt, StoredCheckpoint)
        for part in range(config.num_layers + 2):
            noted = _load_part(model, part, ckpt, _NoReads())
            all_noted += noted
            if 0 < part <= config.num_layers:
                found += [product.shapes() for product in products(model.layers[part - 1], noted)]
        _check_all_known(ckpt.source, {read.name for read in all_noted})
    return Listing(found, sum(read.into.numel() for read in all_noted))


def _check_all_known(source: Source, known: set[str]) -> None:
    """Raises UserError if there are tensors that our models do not read: the checkpoint would come out without them."""
    if not isinstance(source, SafetensorsFolder):
        return
    unknown = [name for name in source.tensors if name not in known and not name.endswith(UNUSED)]
    if unknown:
        raise UserError(
            f"{source.path} has {len(unknown):,} tensors of layers that cannot be quantized, as {sorted(unknown)[0]}: "
            "only text models without adapters and other additions can be"
        )


def _load_part(model: Model, part: int, ckpt: StoredCheckpoint, reads: Reads) -> list[ReadTensor]:
    """Load the embedding, a layer, or the norm and head. Returns what is read of the checkpoint."""
    noting = NotingCheckpoint(source=ckpt.source, reads=reads)
    if part == 0:
        model.load_embedding(noting)
    elif part <= len(model.layers):
        model.load_layer(part - 1, noting)
    else:
        model.load_head(noting)
    return noting.noted


@dataclass(frozen=True)
class Part:
    """What became of a part of the model."""

    tensors: dict[str, Tensor]  # as they are stored
    errors: dict[str, float]  # of each quantized layer: squared error of its outputs, relative to their size
    hidden: Tensor | None  # [T, hidden_size], what goes into the next part


class Walk:
    """Makes the parts of a checkpoint, one after the other.

    tokens [samples, seq_len] go through the model; None: nothing does, and weights are rounded to nearest.
    """

    def __init__(
        self,
        source: Path,
        config: ModelConfig,
        recipe: Recipe,
        scheme: Scheme,
        stored: Format,
        device: torch.device,
        tokens: Tensor | None,
    ) -> None:
        self.source, self.recipe, self.scheme, self.stored = source, recipe, scheme, stored
        self.device, self.tokens = device, tokens
        self.dtype: torch.dtype = getattr(torch, config.dtype)  # of what is stored
        longest = BLOCK_SIZE if tokens is None else tokens.shape[1]
        self.model = build_model(config, torch.float32, device, max_model_len=longest)
        self.num_parts = config.num_layers + 2

    def describe(self, part: int) -> str:
        if part == 0:
            return "embedding"
        return f"layer {part} of {self.num_parts - 2}" if part < self.num_parts - 1 else "norm and head"

    def make(self, part: int, hidden: Tensor | None) -> Part:
        """The part, given the hidden states [T, hidden_size] that go into it."""
        with open_checkpoint(self.source) as ckpt:
            assert isinstance(ckpt, StoredCheckpoint)
            noted = _load_part(self.model, part, ckpt, ckpt.reads)
        return self._make(part, noted, hidden)

    @torch.inference_mode()  # loading is not in it: threads that fill a tensor are in no mode of ours
    def _make(self, part: int, noted: list[ReadTensor], hidden: Tensor | None) -> Part:
        if 0 < part <= len(self.model.layers):
            return self._make_layer(part - 1, noted, hidden)
        if part == 0 and self.tokens is not None:
            hidden = self.model.embed(self.tokens.flatten().to(self.device))
        return Part(self._as_stored(noted, {}), {}, hidden)

    def _make_layer(self, number: int, noted: list[ReadTensor], hidden: Tensor | None) -> Part:
        layer = self.model.layers[number]
        solved: dict[str, QuantizedWeight] = {}
        errors: dict[str, float] = {}
        todo = [p for p in products(layer, noted) if not any(self.recipe.skips(name) for name in p.rows)]
        for product in todo:
            if hidden is None:
                self._round(product, solved, errors)
            else:
                solve = partial(self._solve, product, solved, errors)
                product.linear.weight = Observer(product.linear, solve)
        if hidden is not None:
            hidden = self._forward(layer, hidden)
        for product in todo:
            del product.linear.weight  # of this layer only its norms stay in memory
        return Part(self._as_stored(noted, solved), errors, hidden)

    def _round(self, product: Product, solved: dict[str, QuantizedWeight], errors: dict[str, float]) -> None:
        for name, rows in product.rows.items():
            weight = product.weight[rows]
            solved[name] = self._rounded(weight)
            error = (solved[name].dequantize() - weight).square().sum() / weight.square().sum()
            errors[name] = _shown(error)

    def _solve(
        self, product: Product, solved: dict[str, QuantizedWeight], errors: dict[str, float], x: Tensor
    ) -> Weight:
        """What stands for a product's weight from now on. x [T, in]: all that it is multiplied with here."""
        inputs = Inputs(x.shape[1], x.device)
        inputs.add(x)
        hessian = inputs.hessian
        whole = gptq(product.weight, hessian, self.scheme, act_order=self.recipe.desc_act)
        whole = replace(whole, scales=whole.scales.to(self.stored.scale_dtype(self.dtype)))
        dequantized = whole.dequantize()
        for name, rows in product.rows.items():
            solved[name] = _some_rows(whole, rows)
            weight = product.weight[rows]
            error = output_error(dequantized[rows] - weight, hessian).sum() / output_error(weight, hessian).sum()
            errors[name] = _shown(error)
        return PlainWeight(dequantized)

    def _rounded(self, weight: Tensor) -> QuantizedWeight:
        """To nearest, on the grid whose scales are as they are stored."""
        grid = round_to_nearest(weight, self.scheme)
        return round_to_grid(weight, self.scheme, grid.scales.to(self.stored.scale_dtype(self.dtype)), grid.zeros)

    def _forward(self, layer: DecoderLayer, hidden: Tensor) -> Tensor:
        """Hidden states [T, hidden_size] behind the layer, of those before it."""
        assert self.tokens is not None
        batch = _batch(self.tokens, self.device)
        num_blocks = batch.block_table.numel()
        kv_cache.allocate([layer.attention], num_blocks, torch.float32, self.device)
        residual = torch.zeros_like(hidden)
        heads = layer.attend(hidden, residual, batch)
        kv_cache.release([layer.attention])
        return layer.transform(heads, residual) + residual

    def _as_stored(self, noted: list[ReadTensor], solved: dict[str, QuantizedWeight]) -> dict[str, Tensor]:
        """What was read, by name, as it is written: quantized, or in the model's type."""
        tensors: dict[str, Tensor] = {}
        for name, weight in solved.items():
            tensors |= self.stored.write(name, weight, self.dtype)
        for read in noted:
            if read.name.removesuffix(".weight") not in solved:
                part = (read.into - read.plus).to("cpu", self.dtype) if read.plus else read.into.to("cpu", self.dtype)
                is_more = read.name in tensors  # rows of a tensor that holds several
                tensors[read.name] = torch.cat([tensors[read.name], part]) if is_more else part
        return {name: tensor.contiguous() for name, tensor in tensors.items()}


class Observer(Weight):
    """Stands for a linear layer's weight until its inputs come, has it solved for them, and gives way to the result."""

    def __init__(self, linear: ColumnParallelLinear | RowParallelLinear, solve: Callable[[Tensor], Weight]) -> None:
        self.linear, self.solve = linear, solve

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        self.linear.weight = self.solve(x)
        return self.linear.weight.apply(x, bias)

    def apply_gated(self, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        self.linear.weight = weight = self.solve(x)
        return torch.cat([weight.apply_gated(rows, bias, kind) for rows in x.split(CHUNK_ROWS)])


def _batch(tokens: Tensor, device: torch.device) -> ForwardBatch:
    """All samples [samples, seq_len] as prompts."""
    num_samples, seq_len = tokens.shape
    blocks_each = -(-seq_len // BLOCK_SIZE)
    rows = torch.arange(num_samples, dtype=torch.int32, device=device)
    positions = torch.arange(seq_len, dtype=torch.int32, device=device)
    return ForwardBatch(
        token_ids=tokens.flatten().to(device),
        positions=positions.repeat(num_samples),
        slot_mapping=(rows.unsqueeze(1) * blocks_each * BLOCK_SIZE + positions).flatten(),
        query_start=torch.arange(num_samples + 1, dtype=torch.int32, device=device) * seq_len,
        context_lens=torch.full_like(rows, seq_len),
        rows=rows,
        block_table=torch.arange(num_samples * blocks_each, dtype=torch.int32, device=device).view(num_samples, -1),
        num_decodes=num_samples if seq_len == 1 else 0,
        max_query_len=seq_len,
        max_context_len=seq_len,
    )


def _some_rows(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    """Of a weight whose rows have scales of their own."""
    zeros = None if weight.zeros is None else weight.zeros[rows]
    return replace(weight, numbers=weight.numbers[rows], scales=weight.scales[rows], zeros=zeros)


def _shown(error: Tensor) -> float:
    """To four digits: the last ones depend on the number of threads."""
    return float(f"{error.item():.4g}")
