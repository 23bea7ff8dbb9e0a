"""From a recipe to a checkpoint: all that can be refused is, then the model is walked part by part, then the folder is
put together. What is on the disk already is not made again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import torch

from engine.calibration import Walk, sample_tokens
from engine.errors import UserError
from engine.files import write_json
from engine.hub import resolve_model
from engine.model_config import ModelConfig
from engine.products import list_tensors
from engine.quantization import checkpoint_folder
from engine.quantization.formats import Format, describe, make_format
from engine.quantization.recipe import Recipe
from engine.quantization.unfinished import Unfinished, remove_unfinished
from engine.quantization.weight import Scheme
from engine.tokenizer import Tokenizer
from engine.worker import pick_device

VERSION = 1  # counts up when the same choices make another checkpoint
RECORD = "quantization.json"  # in the checkpoint: the choices, and the error of each layer
TEXT = Path(__file__).parent / "quantization" / "texts" / "pride-and-prejudice.txt"
GGUF_ENDING = re.compile(r"([.-](I?Q\d\w*|B?F16|F32))?\.gguf$", re.IGNORECASE)  # with the type, which it is no more
DIGEST_PIECES, PIECE_BYTES = 64, 64 << 10

OnProgress = Callable[[str, int, int], None]  # what is going on, parts of the model done, parts in all


def quantize(plan: Plan, on_progress: OnProgress) -> None:
    """Make the checkpoint that is planned, in the memory of a layer at a time.

    Raises UserError, before hours are spent, where text, disk and output do not do.
    """
    if plan.is_made():
        remove_unfinished(plan.output)
        return
    recipe = plan.recipe
    device = pick_device(recipe.device)
    tokens = sample_tokens(Tokenizer.load(str(plan.source)), plan.text(), recipe) if recipe.is_calibrated else None
    with Unfinished(plan.output, plan.choices | {"device": device.type}) as unfinished:
        plan.check_space(unfinished.folder, 0 if tokens is None else tokens.numel())
        walk = Walk(plan.source, plan.config, recipe, plan.scheme, plan.format, device, tokens)
        for part in range(unfinished.num_finished, walk.num_parts):
            on_progress(walk.describe(part), part, walk.num_parts)
            made = walk.make(part, unfinished.hidden(device))
            unfinished.finish_part(made.tensors, made.errors, made.hidden)
        on_progress("putting the folder together", walk.num_parts, walk.num_parts)
        folder = unfinished.join_parts()
        checkpoint_folder.fill(folder, plan.source, plan.source_config, plan.format)
        write_json(folder / RECORD, plan.choices | {"device": device.type, "errors": unfinished.report()})
        plan.write_card(folder)
        unfinished.finish()


@dataclass(frozen=True)
class Plan:
    """What a recipe means for a model: which layers become what."""

    recipe: Recipe
    source: Path
    source_config: dict[str, Any]
    config: ModelConfig
    shapes: dict[str, tuple[int, int]]  # of the linear layers to quantize, [out, in], by name
    num_kept: int  # numbers that stay as they are
    scheme: Scheme
    format: Format

    @classmethod
    def of(cls, recipe: Recipe) -> Plan:
        """Raises UserError for a model that this recipe is not for."""
        source = resolve_model(recipe.model, recipe.revision)
        config = ModelConfig.from_path(source)
        if config.quantization:
            method = config.quantization.get("quant_method", "method unnamed")
            raise UserError(f"{source} is quantized already ({method}): give the model that it was made from")
        if (recipe.seq_len or 0) > config.max_model_len:
            raise UserError(f"--seq-len {recipe.seq_len:,} is longer than this model's {config.max_model_len:,} tokens")
        listed = list_tensors(source, config)
        shapes = {name: shape for product in listed.products for name, shape in product.items()}
        _check_skipped(recipe, listed.products)
        ignored = [name for name in shapes if recipe.skips(name)]
        shapes = {name: shape for name, shape in shapes.items() if name not in ignored}
        if not shapes:
            raise UserError(f"--skip {recipe.skip} leaves nothing to quantize")
        scheme = recipe.scheme(shapes)
        stored = make_format(recipe.format, scheme, act_order=recipe.desc_act, ignored=ignored)
        for name, shape in shapes.items():
            stored.check(name, shape)
        num_kept = listed.num_numbers - sum(map(prod, shapes.values()))
        source_config = checkpoint_folder.read_config(source)
        return cls(recipe, source, source_config, config, shapes, num_kept, scheme, stored)

    @property
    def output(self) -> Path:
        """By default in the working folder, called after the model and what is made of it."""
        if self.recipe.output is not None:
            return self.recipe.output.expanduser().absolute()
        name = self.source.name if not self.recipe.model else Path(self.recipe.model).expanduser().absolute().name
        words = [GGUF_ENDING.sub("", name), self.recipe.kind]
        words += [f"block{self.recipe.block}"] * (self.recipe.block is not None)
        words += [f"g{self.recipe.group_size}"] * ((self.recipe.group_size or 0) > 0)
        words += ["sym"] * (self.recipe.int4 and self.recipe.is_symmetric)
        words += [self.recipe.solver] * (self.recipe.solver != replace(self.recipe, method=None).solver)
        words += [self.recipe.format] * (self.recipe.format not in ("compressed-tensors", words[-1]))
        return Path("-".join(words)).absolute()

    @property
    def name(self) -> str:
        """As in `int4 gptq g64 asym`."""
        _, columns = self.scheme.block
        words: list[str] = [self.recipe.kind, self.recipe.solver]
        if self.recipe.int4:
            words += [f"g{columns}"] * bool(columns) + ["sym" if self.scheme.is_symmetric else "asym"]
        if self.recipe.block:
            words.append(f"block {columns}")
        return " ".join(words)

    def errors(self) -> dict[str, float]:
        """Of each layer of the checkpoint that was made, ‖(W - Ŵ) · x‖² / ‖W · x‖², by name; x = 1 if none was seen."""
        record = json.loads((self.output / RECORD).read_text(encoding="utf-8"))
        return dict(record["errors"])

    def write_card(self, folder: Path, report: str = "") -> None:
        """The model card. report: Markdown of what the model lost."""
        model = self.recipe.model or self.source.stem
        checkpoint_folder.write_card(folder, self.source, model, f"{describe(self.scheme)} ({self.name})", report)

    @property
    def choices(self) -> dict[str, Any]:
        """All that the checkpoint's bytes depend on, but for the machine."""
        chosen = asdict(self.recipe)
        for name in ("output", "device", "calibration", "model", "revision"):
            del chosen[name]
        text = hashlib.sha256(self.text().encode()).hexdigest()[:16] if self.recipe.is_calibrated else None
        return {"version": VERSION, "source": _digest(self.source), **chosen, "text": text}

    def is_made(self) -> bool:
        """Whether the output is what this recipe makes. Raises UserError if it is something else."""
        if not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir())):
            return False
        try:
            found = json.loads((self.output / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"{self.output} is there already, and is not ours: choose another --output") from None
        choices = json.loads(json.dumps(self.choices))
        changed = [key for key, value in choices.items() if found.get(key) != value]
        if changed:
            was = ", ".join(f"{key} {found.get(key)!r}" for key in changed)
            raise UserError(f"{self.output} is there already, made otherwise ({was}): choose another --output")
        return True

    def text(self) -> str:
        """What is calibrated with. Raises UserError."""
        file = self.recipe.calibration or TEXT
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"--calibration {file} cannot be read as text ({error})") from None
        if not text.strip():
            raise UserError(f"--calibration {file} is empty: give a text like what the model is for")
        return text

    def check_space(self, folder: Path, num_tokens: int) -> None:
        """Raises UserError unless the disk has room for the parts, the checkpoint made of them, and the state."""
        kept_bytes = self.num_kept * getattr(torch, self.config.dtype).itemsize
        quantized = sum(
            out * inputs * self.scheme.bits // 8 + prod(self.scheme.grid_shape(out, inputs)) * 4
            for out, inputs in self.shapes.values()
        )
        needed = 2 * (kept_bytes + quantized) + 2 * num_tokens * self.config.hidden_size * 4 + (64 << 20)
        there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        free = shutil.disk_usage(folder).free
        if free + there < needed:
            raise UserError(
                f"{folder.parent} has {free / 1e9:,.1f} GB free, but quantizing takes up to {needed / 1e9:,.1f} GB "
                "there: free some, or choose an --output elsewhere"
            )


def _check_skipped(recipe: Recipe, linears: list[dict[str, tuple[int, int]]]) -> None:
    """Raises UserError for a pattern that no layer matches, and for one that tears apart what is one product."""
    names = [name for linear in linears for name in linear]
    for pattern in recipe.skip_patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"--skip {pattern} matches no linear layer; they are called like {names[0]}")
    for linear in linears:
        skipped = [name for name in linear if recipe.skips(name)]
        if skipped and len(skipped) < len(linear):
            raise UserError(
                f"--skip leaves out {', '.join(skipped)}, but not all of {', '.join(linear)}, which run as one "
                "product: skip all of them or none"
            )


def _digest(source: Path) -> str:
    """Of a model's weights: of their sizes, and of pieces all over them."""
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for piece in range(DIGEST_PIECES):
                stream.seek(size * piece // DIGEST_PIECES)
                digest.update(stream.read(PIECE_BYTES))
    return digest.hexdigest()[:16]
