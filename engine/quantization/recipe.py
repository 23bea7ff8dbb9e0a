"""How a checkpoint is quantized: every choice once, and what is refused before any work begins.

A field is a flag of `vcli quantize`, a VCLI_* variable and a line of --print-config (vcli/flags.py). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from engine.errors import UserError

if TYPE_CHECKING:
    from engine.quantization.weight import Scheme

Kind = Literal["int4", "int8", "fp8"]
Method = Literal["gptq", "awq", "rtn"]
GROUP_SIZES = (128, 64, 32)  # the larger, the fewer scales there are to store and to read

# What calibrates when the person does not say: more tokens of the same novel made nothing better.
NUM_SAMPLES, SEQ_LEN = 32, 512


@dataclass(frozen=True)
class Recipe:
    """What is quantized, how, and where the result goes. Raises ValueError for what makes no sense together."""

    model: Annotated[str, "local folder, GGUF file or Hugging Face name of the model"] = ""
    revision: Annotated[str, "branch, tag or commit on the hub"] = ""
    output: Annotated[
        Path | None, "folder of the new checkpoint; default: here, named after model and kind", "--output", "-o"
    ] = None
    int4: Annotated[bool, "weights of 4 bits, a scale for each group of inputs", "--int4"] = False
    int8: Annotated[bool, "weights of 8 bits, a scale for each output; inputs are rounded by token", "--int8"] = False
    fp8: Annotated[bool, "weights in e4m3, a scale for each output; inputs are rounded by token", "--fp8"] = False
    method: Annotated[
        Literal["gptq", "awq", "rtn"] | None,
        "how numbers are chosen; rtn rounds to nearest and looks at no text; default: gptq, but rtn for --block",
    ] = None
    group_size: Annotated[
        int | None,
        "int4: inputs that share a scale, 128, 64, 32, or -1 for all; default: the largest that divides every layer",
    ] = None
    sym: Annotated[
        bool | None, "int4: a grid around 0, or one with a zero of its own; default: with zeros", "--sym/--asym"
    ] = None
    desc_act: Annotated[
        bool, "gptq format: a group is of inputs that matter alike, wherever they are; finer, and slower to run"
    ] = False
    block: Annotated[int | None, "fp8: squares of so many rows and columns share a scale, as 128"] = None
    format: Annotated[Literal["compressed-tensors", "gptq", "awq", "fp8"], "how it is stored"] = "compressed-tensors"
    calibration: Annotated[Path | None, "text to calibrate with, like what the model is for; default: a novel"] = None
    samples: Annotated[int | None, f"pieces of the text to calibrate with; default: {NUM_SAMPLES}"] = None
    seq_len: Annotated[int | None, f"tokens in each of them; default: {SEQ_LEN}"] = None
    skip: Annotated[str, "linear layers to leave as they are: names with wildcards, by comma, as *.down_proj"] = ""
    device: Annotated[Literal["auto", "cpu", "cuda"], "where to compute; auto: a GPU where there is one"] = "auto"

    def __post_init__(self) -> None:
        if [self.int4, self.int8, self.fp8].count(True) != 1:
            raise ValueError("say what the weights become, one of --int4, --int8 and --fp8")
        self._check_grid()
        self._check_method()
        if self.format == "awq" and (self.sym or not self.int4):
            raise ValueError("format awq holds 4-bit weights with zeros only: use --int4 --asym, or compressed-tensors")
        if self.format == "fp8" and self.block is None:
            raise ValueError("format fp8 holds e4m3 in blocks only: use --fp8 --block 128, or compressed-tensors")
        if self.format == "gptq" and not self.int4:
            raise ValueError(f"format gptq has no place for --{self.kind}: use compressed-tensors")

    def _check_grid(self) -> None:
        if self.group_size is not None and self.group_size not in (*GROUP_SIZES, -1):
            raise ValueError(f"group_size must be 128, 64, 32 or -1 (all inputs), got {self.group_size}")
        if self.group_size is not None and not self.int4:
            raise ValueError(f"group_size is for --int4: --{self.kind} has one scale for each output")
        if self.sym is False and not self.int4:
            raise ValueError(f"--asym is for --int4: the grids of --{self.kind} are symmetric")
        if self.block is not None and not self.fp8:
            raise ValueError("block is for --fp8")
        if self.block is not None and (self.block < 16 or self.block % 16):
            raise ValueError(f"block must be a multiple of 16, as 128, got {self.block}")

    def _check_method(self) -> None:
        if self.method == "awq" and not self.int4:
            raise ValueError("method awq is for --int4: use gptq or rtn")
        if self.method == "gptq" and self.block is not None:
            raise ValueError("method gptq rounds row by row: --block goes with rtn only")
        if self.desc_act and self.solver != "gptq":
            raise ValueError("desc_act is an order that only --method gptq has")
        if self.desc_act and self.format != "gptq":
            raise ValueError(f"desc_act cannot be stored by --format {self.format}: use --format gptq")
        for name in ("samples", "seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        given = [name for name in ("calibration", "samples", "seq_len") if getattr(self, name) is not None]
        if given and not self.is_calibrated:
            raise ValueError(f"{given[0]} changes nothing: rounding to nearest looks at no text")

    @property
    def kind(self) -> Kind:
        return "int4" if self.int4 else "int8" if self.int8 else "fp8"

    @property
    def solver(self) -> Method:
        return self.method or ("gptq" if self.block is None else "rtn")

    @property
    def is_calibrated(self) -> bool:
        return self.solver != "rtn"

    @property
    def is_symmetric(self) -> bool:
        if self.sym is not None:
            return self.sym
        return not self.int4

    def skips(self, name: str) -> bool:
        """Whether the linear layer `model.layers.0.self_attn.q_proj` is to stay as it is."""
        return any(fnmatchcase(name, pattern) for pattern in self.skip_patterns)

    @property
    def skip_patterns(self) -> list[str]:
        return [pattern.strip() for pattern in self.skip.split(",") if pattern.strip()]

    def scheme(self, shapes: dict[str, tuple[int, int]]) -> Scheme:
        """The grid of all quantized layers, whose shapes [out, in] these are, by name. Raises UserError."""
        from engine.quantization.at_load import SCHEMES
        from engine.quantization.weight import ALL, Scheme

        if self.block is not None:
            sides = {length for shape in shapes.values() for length in shape}
            _check_divides("--block", self.block, sides, [size for size in (128, 64, 32) if _divides(size, sides)])
            return Scheme("float", 8, (self.block, self.block), rounds_inputs=True)
        if not self.int4:
            return SCHEMES[self.kind]
        inputs = {in_features for _, in_features in shapes.values()}
        fitting = [size for size in GROUP_SIZES if _divides(size, inputs)]
        if self.group_size is None and not fitting:
            raise UserError(
                f"layers have {_listed(inputs)} inputs, which no group of {_listed(GROUP_SIZES)} divides: "
                "use --group-size -1"
            )
        group_size = fitting[0] if self.group_size is None else self.group_size
        if group_size == -1:
            return Scheme("int", 4, (1, ALL), self.is_symmetric)
        _check_divides("--group-size", group_size, inputs, [*fitting, -1])
        return Scheme("int", 4, (1, group_size), self.is_symmetric)


def _divides(size: int, lengths: Iterable[int]) -> bool:
    return all(length % size == 0 for length in lengths)


def _check_divides(flag: str, size: int, lengths: set[int], fitting: list[int]) -> None:
    if _divides(size, lengths):
        return
    hint = f"use {_listed(fitting)}" if fitting else "leave it out"
    raise UserError(f"{flag} {size} does not divide the widths of this model's layers, {_listed(lengths)}: {hint}")


def _listed(numbers: Iterable[int]) -> str:
    """64, 32 or -1"""
    words = [f"{number:,}" for number in (sorted(numbers) if isinstance(numbers, set) else numbers)]
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
