"""Checkpoints go to and fro between vcli and the libraries that defined their formats, without a bit's difference.

Each library lives in an environment of its own, which `make interop` builds; without it its tests are skipped. A run of
them is minutes long; what stays in the normal run are tests/data/checkpoints (see keep.py).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.checkpoint import open_checkpoint
from engine.model_config import ModelConfig
from engine.models import build_model
from engine.parallel.groups import Group
from engine.quantization.at_load import find_format
from engine.quantization.formats import read_format
from engine.quantization.recipe import Recipe
from engine.quantize import Plan, quantize
from tests.engine.forward import run
from tests.engine.quantization.formats.stored import stored
from tests.interop import run_auto_gptq, run_autoawq, run_gptqmodel, run_llm_compressor

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SHAPE = {"hidden_size": 64, "intermediate_size": 192, "num_key_value_heads": 4}  # AutoAWQ takes 64 outputs at a time
LAYERS = [
    f"model.layers.{i}.{part}_proj" for i in range(2)
    for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]  # fmt: skip
GPTQ = {"int4": True, "group_size": 32, "format": "gptq"}
AWQ = {"int4": True, "group_size": 32, "format": "awq", "method": "rtn"}
SMALL = {"samples": 4, "seq_len": 64}


Choices = dict[str, Any]  # of a recipe


@dataclass(frozen=True)
class Library:
    script: str
    dtype: str  # of the model that it quantizes
    writes: list[str]
    runs: dict[str, Choices]  # what we write and it runs
    reads: dict[str, Choices]  # what we write and of which it reads the weights alone
    tolerance: float = 1e-5  # of the logits, relative


LIBRARIES = {
    "llm-compressor": Library(
        "run_llm_compressor.py", "float32", list(run_llm_compressor.CASES), {
            "int4-sym": {"int4": True, "group_size": 32, "sym": True, **SMALL},
            "int4-asym": {"int4": True, "group_size": 32, "sym": False, **SMALL},
            "int4-rows": {"int4": True, "group_size": -1, "method": "rtn"},
            "int4-skip": {"int4": True, "method": "rtn", "skip": "*.0.mlp.down_proj,*.1.self_attn.o_proj"},
            "int8": {"int8": True, "method": "rtn"},
            "fp8": {"fp8": True},
            "fp8-blocks": {"fp8": True, "block": 32},
        }, {
            "fp8-of-transformers": {"fp8": True, "block": 32, "format": "fp8"},  # without a GPU it rounds no inputs
        },
    ),
    "gptqmodel": Library(
        "run_gptqmodel.py", "bfloat16", list(run_gptqmodel.CASES), {
            "gptq-sym": {**GPTQ, "sym": True, **SMALL},
            "gptq-asym": {**GPTQ, "sym": False, **SMALL},
            "gptq-desc-act": {**GPTQ, "desc_act": True, **SMALL},
            "awq": AWQ,
        }, {
            "gptq-skip": {**GPTQ, "method": "rtn", "skip": "*.0.mlp.down_proj,*.1.self_attn.o_proj"},
            "gptq-rows": {**GPTQ, "group_size": -1, "sym": True, "method": "rtn"},
        }, tolerance=2e-2,  # it computes in float16, within transformers with scales of bfloat16
    ),
    "auto-gptq": Library(
        "run_auto_gptq.py", "float32", list(run_auto_gptq.CASES), {}, {
            "gptq-sym": {**GPTQ, "sym": True, **SMALL},
            "gptq-desc-act": {**GPTQ, "sym": True, "desc_act": True, **SMALL},
        },
    ),
    "autoawq": Library("run_autoawq.py", "float16", list(run_autoawq.CASES), {}, {"awq": AWQ}),
}  # fmt: skip

Exchange = Callable[[str], Path]  # the folder below which a library wrote theirs/ and read ours/


@pytest.fixture(scope="session")
def exchange(tmp_path_factory, tiny_checkpoint) -> Exchange:
    made: dict[str, Path] = {}

    def run_once(name: str) -> Path:
        python, library = ROOT / ".interop" / name / "bin/python", LIBRARIES[name]
        if not python.exists():
            pytest.skip(f"{name} has no environment here: make interop builds it")
        if name not in made:
            folder = made[name] = tmp_path_factory.mktemp(name)
            source = tiny_checkpoint("llama", dtype=library.dtype, **SHAPE)
            for case, choices in (library.runs | library.reads).items():
                recipe = Recipe(model=str(source), output=folder / "ours" / case, **choices)
                quantize(Plan.of(recipe), lambda *_: None)
            with open(folder / "log", "w") as log:
                command = [python, HERE / library.script, source, folder / "theirs", folder / "ours"]
                subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)  # the tests tell how it went
        return made[name]

    return run_once


def made_of(folder: Path, name: str) -> dict[str, Tensor]:
    """What a library made of a checkpoint."""
    file = folder.with_suffix(".values")
    log = folder.parent.parent / "log"
    said = log.read_text().splitlines()[-30:] if log.exists() else ["it was not run"]
    assert file.exists(), f"{name} made nothing of {folder.name}:\n" + "\n".join(said)
    return load_file(file)


def assert_same_weights(folder: Path, library: dict[str, Tensor]) -> None:
    """Each quantized layer, in the library's own number type."""
    quantized = read_format(json.loads((folder / "config.json").read_text())["quantization_config"], folder)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    layers = [layer for layer in LAYERS if quantized.scheme_of(layer) is not None]
    assert layers, "nothing is quantized"
    for layer in layers:
        weight = library[f"{layer}.weight"]
        found = quantized.read(layer, tuple(weight.shape), stored(tensors)).dequantize()
        assert torch.equal(found.to(weight.dtype), weight), layer
    for layer in LAYERS:  # those left out are stored as they are
        is_whole = f"{layer}.weight" in tensors and tensors[f"{layer}.weight"].dtype.itemsize > 1
        assert is_whole == (layer not in layers), layer


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "case"), [(name, case) for name in LIBRARIES for case in LIBRARIES[name].writes])
def test_a_library_s_checkpoint_is_read_exactly(name, case, exchange):
    folder = exchange(name) / "theirs" / case
    assert_same_weights(folder, made_of(folder, name))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in LIBRARIES for case in LIBRARIES[name].runs | LIBRARIES[name].reads]
)
def test_a_library_reads_our_checkpoint_exactly(name, case, exchange):
    folder = exchange(name) / "ours" / case
    assert_same_weights(folder, made_of(folder, name))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "case"), [(name, case) for name in LIBRARIES for case in LIBRARIES[name].runs])
def test_a_library_computes_the_same_logits(name, case, exchange):
    """A rounded input may lie in the middle between two: there its token parts, and all that look back at it.

    Of int8 every token does: compressed-tensors divides its largest input by 127.5, vLLM and we by 127.
    """
    folder, tolerance = exchange(name) / "ours" / case, LIBRARIES[name].tolerance
    library = made_of(folder, name)
    for key in ["logits", "transformers.logits"] if name == "gptqmodel" else ["logits"]:
        expected = library[key][0].float()
        errors = (our_logits(folder) - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert errors.max() < (0.1 if case in ("int8", "fp8", "fp8-blocks") else tolerance), key
        assert errors[:4].max() < (0.03 if case == "int8" else tolerance), key


def our_logits(folder: Path) -> Tensor:
    """Of the tokens that the scripts give to the libraries."""
    model = build_model(ModelConfig.from_path(folder), torch.float32, torch.device("cpu"), Group())
    with open_checkpoint(folder, linear_format=find_format(ModelConfig.from_path(folder), "auto", folder)) as ckpt:
        model.load(ckpt)
    return run(model, torch.arange(3, 35), [32])
