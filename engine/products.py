"""Which layers and tensors of a checkpoint a model's products are: what a layer reads says so when it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import Reads, Source, StoredCheckpoint, open_checkpoint
from engine.errors import UserError
from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.layers.weights import PlainWeight
from engine.model_config import ModelConfig
from engine.models import Model, build_model
from engine.models.decoder import DecoderLayer
from engine.parallel.groups import Group
from engine.safetensors import SafetensorsFolder

UNUSED = ("rotary_emb.inv_freq",)  # in old checkpoints, and worked out by everybody who reads them


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
            assert isinstance(linear.weight, PlainWeight), "what is to be quantized is not yet"
            yield Product(linear, linear.weight.tensor, _rows(_names(linear), noted))


def _names(linear: ColumnParallelLinear | RowParallelLinear) -> tuple[str, ...]:
    """The last words of the names that a checkpoint's layers in this one may have."""
    if isinstance(linear, RowParallelLinear):
        return (linear.stored.name,)
    return (*linear.parts, linear.fused_name)


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
            noted = load_part(model, part, ckpt, _NoReads())
            all_noted += noted
            if 0 < part <= config.num_layers:
                found += [product.shapes() for product in products(model.layers[part - 1], noted)]
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()  # some store the embedding twice
        _check_all_known(ckpt.source, {read.name for read in all_noted} | tied)
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


def load_part(model: Model, part: int, ckpt: StoredCheckpoint, reads: Reads) -> list[ReadTensor]:
    """Load the embedding, a layer, or the norm and head. Returns what is read of the checkpoint."""
    noting = NotingCheckpoint(source=ckpt.source, reads=reads)
    if part == 0:
        model.load_embedding(noting)
    elif part <= len(model.layers):
        model.load_layer(part - 1, noting)
    else:
        model.load_head(noting)
    return noting.noted
