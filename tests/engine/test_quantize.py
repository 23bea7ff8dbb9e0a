"""A checkpoint is quantized as its recipe says, whatever happens on the way."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import files
from engine.quantization.formats import read_format
from engine.quantization.recipe import Recipe
from engine.quantization.weight import Scheme, round_to_nearest
from engine.quantize import quantize

TEXT = Path(__file__).parent.parent.parent / "engine/quantization/texts/pride-and-prejudice.txt"
FAMILIES = ["llama", "qwen3", "gemma3", "phi3"]


def made(source: Path, output: Path, **choices) -> Path:
    small = {"samples": 4, "seq_len": 32} if choices.get("method") in ("gptq", "awq") else {}
    return quantize(Recipe(model=str(source), output=output, **(small | choices)), lambda *_: None)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def quantized_weights(folder: Path, source: Path) -> dict[str, torch.Tensor]:
    """The original weight of each quantized layer, and what its folder makes of it."""
    config = json.loads((folder / "config.json").read_text())
    stored = read_format(config["quantization_config"], folder)
    tensors = tensors_of(folder)

    def get(name, shape, dtype):
        tensor = tensors[name].reshape(shape)
        return tensor if dtype is None else tensor.to(dtype)

    found = {}
    for name, weight in tensors_of(source).items():
        layer = name.removesuffix(".weight")
        if weight.dim() == 2 and "embed" not in name and stored.scheme_of(layer) is not None:
            found[layer] = (weight, stored.read(layer, tuple(weight.shape), get))
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_to_nearest_is_that_of_each_weight(family, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(family)
    folder = made(source, tmp_path / "out", int4=True, method="rtn", sym=True)
    found = quantized_weights(folder, source)
    assert len(found) == 2 * 4 if family == "phi3" else 7 * (4 if family == "gemma3" else 2)
    for weight, quantized in found.values():
        expected = round_to_nearest(weight, Scheme("int", 4, (1, 32)))
        assert torch.equal(quantized.numbers, expected.numbers)
        assert torch.equal(quantized.scales, expected.scales)


def test_what_is_not_quantized_is_as_it_was(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("gemma3", dtype="bfloat16")
    folder = made(source, tmp_path / "out", fp8=True)
    before, after = tensors_of(source), tensors_of(folder)
    kept = [name for name in before if "norm" in name or "embed" in name]
    assert len(kept) > 20
    assert all(torch.equal(before[name], after[name]) for name in kept)


CHOICES = {"int4": True, "method": "gptq", "group_size": 32}
FLAGS = ["--int4", "--method", "gptq", "--group-size", "32", "--samples", "4", "--seq-len", "32"]


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint, tmp_path_factory) -> dict[str, bytes]:
    return files_of(made(tiny_checkpoint("llama"), tmp_path_factory.mktemp("undisturbed") / "out", **CHOICES))


def test_a_process_killed_again_and_again_makes_the_same_bytes(tiny_checkpoint, tmp_path, undisturbed):
    output, generator = tmp_path / "out", random.Random(0)
    command = [sys.executable, "-m", "vcli", "quantize", str(tiny_checkpoint("llama")), *FLAGS, "-o", str(output)]
    for num_lines in (1, 2, 3):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for _ in range(num_lines):
            process.stderr.readline()  # a line for each part
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert not output.exists(), "only a whole checkpoint has its name"
    subprocess.run(command, check=True)
    assert files_of(output) == undisturbed
    assert list(tmp_path.iterdir()) == [output]


class Death(BaseException):
    """The end of a process, wherever it is."""


def test_it_may_end_at_any_file_that_is_written(tiny_checkpoint, tmp_path, undisturbed, monkeypatch):
    """Each run ends one sync later than the one before it, and goes on where that one was."""
    output, sync, num_left = tmp_path / "out", files._sync, 0

    def sync_or_die(path):
        nonlocal num_left
        num_left -= 1
        if num_left == 0:
            raise Death
        sync(path)

    monkeypatch.setattr(files, "_sync", sync_or_die)
    for num_syncs in range(1, 100):
        num_left = num_syncs
        try:
            made(tiny_checkpoint("llama"), output, **CHOICES)
            break
        except Death:
            assert not output.exists() or files_of(output) == undisturbed
    assert num_syncs > 5, "it died often"
    assert files_of(output) == undisturbed
    made(tiny_checkpoint("llama"), output, **CHOICES)
    assert list(tmp_path.iterdir()) == [output]
