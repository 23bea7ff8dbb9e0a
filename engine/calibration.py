"""A model is walked part by part: the embedding, each layer, the last norm and head. One part is in memory at a time.

All samples of the calibration text go through a layer at once, and each of its linear layers is solved at the moment
its inputs arrive: an observer stands in for its weight, and puts the quantized one there before it answers. So whatever
comes later, in this layer and in those after it, sees the errors made before. Rounding to nearest looks at no text and
runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine import kv_cache, ops
from engine.batch import ForwardBatch
from engine.chat_template import render_chat
from engine.checkpoint import StoredCheckpoint, open_checkpoint
from engine.config import BLOCK_SIZE
from engine.errors import UserError
from engine.folding import Maker, find_makers
from engine.layers.weights import Weight
from engine.model_config import ModelConfig
from engine.models import build_model
from engine.models.decoder import DecoderLayer
from engine.ops import Activations
from engine.products import Product, ReadTensor, load_part, products
from engine.quantization.formats import Format
from engine.quantization.recipe import NUM_SAMPLES, SEQ_LEN, Recipe
from engine.quantization.solvers.awq import awq, awq_scales
from engine.quantization.solvers.gptq import gptq
from engine.quantization.solvers.inputs import FIRST_TOKEN_COUNT, Inputs, output_error
from engine.quantization.solvers.smooth import round_inputs, smooth_scales
from engine.quantization.weight import QuantizedWeight, Scheme, round_to_grid, round_to_nearest
from engine.tokenizer import Tokenizer

TURN_TOKENS = 64  # of the calibration text in a turn of a conversation made of it
SMOOTHING_ROWS = 1024  # that strengths of smoothing are tried on
CHUNK_ROWS = 4096  # tokens of a gated product at a time: what it makes in between is twice as wide as its result


def sample_tokens(tokenizer: Tokenizer, text: str, recipe: Recipe) -> Tensor:
    """[samples, seq_len] token ids: pieces from all over the text, each begun as the tokenizer begins a prompt.

    Of a model with a chat template every second piece is a conversation: what it has learned to do with the tokens
    around turns is lost otherwise, as prose has none of them. Fewer samples if the text has no more. Raises UserError
    if it has not even one.
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
    pieces = [token_ids[start : start + length] for start in starts]
    samples = [begin + piece for piece in pieces]
    for i in range(1, num_samples, 2):
        samples[i] = _as_conversation(tokenizer, pieces[i], seq_len) or samples[i]
    return torch.tensor(samples, dtype=torch.int32)


def _as_conversation(tokenizer: Tokenizer, piece: list[int], seq_len: int) -> list[int] | None:
    """Text as turns that change at every TURN_TOKENS, cut to a sample; None: the model has no conversations."""
    if tokenizer.chat_template is None:
        return None
    turns = [
        tokenizer.decode(piece[start : start + TURN_TOKENS]).strip() for start in range(0, len(piece), TURN_TOKENS)
    ]
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    try:
        prompt = render_chat(
            tokenizer.chat_template,
            messages,
            add_generation_prompt=False,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
        )
    except ValueError:  # a template may refuse any conversation
        return None
    token_ids = tokenizer.encode(prompt, add_special_tokens=False)
    return token_ids[:seq_len] if len(token_ids) >= seq_len else None


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
            noted = load_part(self.model, part, ckpt, ckpt.reads)
        return self._make(part, noted, hidden)

    @torch.inference_mode()  # loading is not in it: threads that fill a tensor are in no mode of ours
    def _make(self, part: int, noted: list[ReadTensor], hidden: Tensor | None) -> Part:
        if 0 < part <= len(self.model.layers):
            return self._make_layer(self.model.layers[part - 1], noted, hidden)
        if part == 0 and self.tokens is not None:
            hidden = self.model.embed(self.tokens.flatten().to(self.device))
        return Part(self._as_stored(noted, {}), {}, hidden)

    def _make_layer(self, layer: DecoderLayer, noted: list[ReadTensor], hidden: Tensor | None) -> Part:
        all_products = list(products(layer, noted))
        todo = [product for product in all_products if not any(map(self.recipe.skips, product.rows))]
        counts = None
        if self.tokens is not None:
            counts = torch.ones(self.tokens.shape, device=self.device)
            counts[:, 0] = FIRST_TOKEN_COUNT
        work = LayerWork(self.recipe, self.scheme, self.stored.scale_dtype(self.dtype), counts)
        if hidden is None:
            for product in todo:
                work.round(product)
        else:
            makers = find_makers(layer, all_products, work.solved, self.dtype)
            for product in todo:
                product.linear.weight = Observer(product, makers[product.linear], work.solve)
            hidden = self._forward(layer, hidden)
        for product in all_products:
            del product.linear.weight  # of this layer only its norms stay in memory
        return Part(self._as_stored(noted, work.solved), work.errors, hidden)

    def _forward(self, layer: DecoderLayer, hidden: Tensor) -> Tensor:
        """Hidden states [T, hidden_size] behind the layer, of those before it."""
        assert self.tokens is not None
        batch = prompts(self.tokens, self.device)
        kv_cache.allocate([layer.attention], batch.block_table.numel(), torch.float32, self.device)
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
        # Each in memory of its own, as safetensors wants it: q, k and v have the same order of groups.
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


class LayerWork:
    """What becomes of the products of one layer: by name, their weights and errors."""

    def __init__(self, recipe: Recipe, scheme: Scheme, scale_dtype: torch.dtype, counts: Tensor | None) -> None:
        """counts [T]: how often each token counts."""
        self.recipe, self.scheme, self.scale_dtype, self.counts = recipe, scheme, scale_dtype, counts
        self.solved: dict[str, QuantizedWeight] = {}
        self.errors: dict[str, float] = {}

    def round(self, product: Product) -> None:
        """Take a product in, its weights rounded to nearest."""
        for name, rows in product.rows.items():
            weight = product.weight[rows]
            self.solved[name] = rounded = self._round(weight)
            self.errors[name] = _shown((rounded.dequantize() - weight).square().sum() / weight.square().sum())

    def solve(self, product: Product, maker: Maker, x: Tensor) -> Weight:
        """Take a product in, its weights solved for inputs x [T, in]. Returns what x is multiplied with from now on."""
        inputs = self._inputs(x)
        weight, factors = product.weight, None
        scales = self._scales([weight[rows] for rows in product.rows.values()], inputs, maker, x)
        if scales is not None:
            factors = maker.divide(scales)
            weight, x = weight * factors, x / factors
            inputs = self._inputs(x)
        hessian = inputs.hessian
        whole = self._solve(weight, inputs)
        dequantized = whole.dequantize()
        for name, rows in product.rows.items():
            self.solved[name] = whole.cut(rows, slice(0, weight.shape[1]))
            error = output_error(dequantized[rows] - weight[rows], hessian).sum()
            self.errors[name] = _shown(error / output_error(weight[rows], hessian).sum())
        return Solved(dequantized, factors, self.scheme)

    def _scales(self, weights: list[Tensor], inputs: Inputs, maker: Maker, x: Tensor) -> Tensor | None:
        """What the inputs x of a product are best divided by, as its maker can. None: by nothing."""
        if self.recipe.int8:
            some = x[:: max(1, len(x) // SMOOTHING_ROWS)]
            return smooth_scales(weights, some, inputs.hessian.diagonal().sqrt(), self.scheme, maker.tie)
        if self.recipe.solver == "awq" and not maker.has_copies:
            return awq_scales(weights, inputs, self.scheme)
        return None

    def _inputs(self, x: Tensor) -> Inputs:
        inputs = Inputs(x.shape[1], x.device)
        inputs.add(x, self.counts)
        return inputs

    def _solve(self, weight: Tensor, inputs: Inputs) -> QuantizedWeight:
        if self.recipe.solver == "awq":
            return awq(weight, inputs, self.scheme, scale_dtype=self.scale_dtype)
        act_order = self.recipe.desc_act
        return gptq(weight, inputs.hessian, self.scheme, act_order=act_order, scale_dtype=self.scale_dtype)

    def _round(self, weight: Tensor) -> QuantizedWeight:
        """To nearest, on the grid whose scales are as they are stored."""
        grid = round_to_nearest(weight, self.scheme)
        return round_to_grid(weight, self.scheme, grid.scales.to(self.scale_dtype), grid.zeros)


Solve = Callable[[Product, Maker, Tensor], Weight]


@dataclass(frozen=True)
class Solved(Weight):
    """A quantized weight in the place of the original: for inputs that are not scaled yet, and not rounded."""

    tensor: Tensor  # [out, in]
    factors: Tensor | None  # [in], what inputs are divided by
    scheme: Scheme

    def apply(self, x: Activations, bias: Tensor | None) -> Tensor:
        assert isinstance(x, Tensor), x
        x = x if self.factors is None else x / self.factors
        return ops.linear(round_inputs(x, self.scheme) if self.scheme.rounds_inputs else x, self.tensor, bias)


class Observer(Weight):
    """Stands for a product's weight until its inputs come, and has it solved for them."""

    def __init__(self, product: Product, maker: Maker, solve: Solve) -> None:
        self.product, self.maker, self.solve = product, maker, solve

    def apply(self, x: Activations, bias: Tensor | None) -> Tensor:
        assert isinstance(x, Tensor), x
        return self.solve(self.product, self.maker, x).apply(x, bias)

    def apply_gated(
        self, x: Activations, bias: Tensor | None, kind: str, rounds_to: torch.dtype | None = None
    ) -> Tensor:
        assert isinstance(x, Tensor), x
        weight = self.solve(self.product, self.maker, x)
        return torch.cat([ops.gated_activation(weight.apply(rows, bias), kind) for rows in x.split(CHUNK_ROWS)])


def prompts(tokens: Tensor, device: torch.device) -> ForwardBatch:
    """Samples [samples, seq_len] as prompts, each with blocks of its own."""
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


def _shown(error: Tensor) -> float:
    """To four digits: the last ones depend on the number of threads."""
    return float(f"{error.item():.4g}")
