"""Layers that GPTQModel, llm-compressor, AutoAWQ and AutoGPTQ wrote are read to the last bit, without any of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine.quantization.formats import read_format
from tests.engine.quantization.formats.stored import stored

FILES = sorted((Path(__file__).parents[3] / "data/checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_layer_is_what_its_library_makes_of_it(file):
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    expected = tensors.pop("dequantized")
    found = read_format(json.loads(metadata["quantization_config"]), file)
    weight = found.read(metadata["layer"], tuple(json.loads(metadata["shape"])), stored(tensors)).dequantize()
    assert torch.equal(weight[: len(expected)].to(expected.dtype), expected)


def test_every_library_is_there():
    for library in ("gptqmodel", "llm-compressor", "autoawq", "auto-gptq"):
        assert any(file.stem.startswith(library) for file in FILES), library
