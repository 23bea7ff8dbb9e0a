"""A checkpoint is quantized as its recipe says, whatever happens on the way."""

import json
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import files, kv_cache
from engine.calibration import prompts
from engine.checkpoint import open_checkpoint
from engine.errors import UserError
from engine.model_config import ModelConfig
from engine.models import build_model
from engine.quantization import at_load
from engine.quantization.formats import read_format
from engine.quantization.recipe import Recipe
from engine.quantization.unfinished import Unfinished
from engine.quantization.weight import Scheme, round_to_nearest
from engine.quantize import Plan, quantize
from engine.tokenizer import Tokenizer

FAMILIES = ["llama", "qwen3", "gemma3", "phi3"]


def made(source: Path, output: Path, **choices) -> Path:
    is_calibrated = choices.get("method") != "rtn" and "block" not in choices
    small = {"samples": 4, "seq_len": 32} if is_calibrated else {}
    quantize(Plan.of(Recipe(model=str(source), output=output, **(small | choices))), lambda *_: None)
    return output


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


def logits_of(path: Path) -> torch.Tensor:
    """Of every token of a prompt, [T, vocab], as the engine computes them in float32."""
    config = ModelConfig.from_path(path)
    model = build_model(config, torch.float32, torch.device("cpu"), max_model_len=64)
    form = at_load.find_format(config, "auto", path)
    with open_checkpoint(path, linear_format=form) as ckpt:
        model.load(ckpt)
    batch = prompts(torch.arange(3, 35, dtype=torch.int32).view(1, -1), torch.device("cpu"))
    kv_cache.allocate(model.attentions, batch.block_table.numel(), torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        return model.logits(model.forward(batch))


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
    folder = made(source, tmp_path / "out", fp8=True, method="rtn")
    before, after = tensors_of(source), tensors_of(folder)
    kept = [name for name in before if "norm" in name or "embed" in name]
    assert len(kept) > 20
    assert all(torch.equal(before[name], after[name]) for name in kept)


@pytest.mark.parametrize(
    "choices",
    [
        {"int4": True, "method": "rtn"},
        {"int4": True, "method": "gptq", "sym": True, "group_size": 32},
        {"int4": True, "method": "awq", "group_size": -1},
        {"int4": True, "method": "gptq", "format": "gptq", "desc_act": True},
        {"int4": True, "method": "awq", "format": "awq", "group_size": 32},
        {"int8": True},
        {"int8": True, "method": "rtn"},
        {"fp8": True},
        {"fp8": True, "method": "rtn"},
        {"fp8": True, "block": 32},
    ],
    ids=lambda choices: " ".join(f"{value}" if isinstance(value, str) else key for key, value in choices.items()),
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_engine_runs_what_was_made(family, choices, tiny_checkpoint, tmp_path):
    """And says nearly what the original says: its logits point the same way."""
    source = tiny_checkpoint(family)
    folder = made(source, tmp_path / "out", **choices)
    before, after = (logits_of(path) for path in (source, folder))
    likeness = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    assert likeness.mean() > (0.9 if choices.get("int4") else 0.99), likeness


def test_transformers_loads_blocks_of_e4m3_without_other_packages(tiny_checkpoint, tmp_path):
    """It multiplies with the dequantized weights on a CPU, in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny_checkpoint("llama")
    folder = made(source, tmp_path / "out", fp8=True, block=32, format="fp8")
    with torch.inference_mode():
        found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
            torch.arange(3, 35).view(1, -1)
        ).logits
    assert torch.nn.functional.cosine_similarity(found[0], logits_of(folder), dim=-1).min() > 0.998
    text = "The sky is"
    assert (
        AutoTokenizer.from_pretrained(folder)(text).input_ids == AutoTokenizer.from_pretrained(source)(text).input_ids
    )


def test_a_gguf_file_becomes_a_whole_folder(default_model, tmp_path):
    """With all that a GGUF file keeps in its header: what transformers and the engine ask a folder for."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = made(default_model, tmp_path / "out", fp8=True, method="rtn")
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_hidden_layers, config.quantization_config["quant_method"]) == (
        "llama",
        30,
        "compressed-tensors",
    )
    ours, original = Tokenizer.load(str(folder)), Tokenizer.load(str(default_model))
    assert ours.chat_template == original.chat_template is not None
    assert ours.encode("It is a truth") == original.encode("It is a truth")
    assert AutoTokenizer.from_pretrained(folder).encode("It is a truth") == original.encode("It is a truth")
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [2]
    expected, found = ModelConfig.from_path(default_model), ModelConfig.from_path(folder)
    assert replace(found, quantization=expected.quantization) == expected


@pytest.mark.parametrize(
    ("choices", "name"),
    [
        ({"int4": True}, "int4"),
        ({"int4": True, "method": "gptq"}, "int4"),
        ({"int4": True, "method": "awq"}, "int4-awq"),
        ({"int4": True, "method": "awq", "format": "awq"}, "int4-awq"),
        ({"int4": True, "format": "gptq"}, "int4-gptq"),
        ({"int4": True, "sym": True, "group_size": 32}, "int4-g32-sym"),
        ({"fp8": True, "method": "rtn"}, "fp8-rtn"),
        ({"fp8": True, "block": 32}, "fp8-block32"),
    ],
)
def test_a_checkpoint_is_called_after_the_model_and_what_is_made_of_it(
    choices, name, tiny_checkpoint, default_model, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    source = tiny_checkpoint("llama")
    assert Plan.of(Recipe(model=str(source), **choices)).output == tmp_path / f"{source.name}-{name}"
    if name == "int4":
        assert Plan.of(Recipe(**choices)).output == tmp_path / "SmolLM2-135M-Instruct-int4"


CHOICES = {"int4": True, "method": "gptq", "group_size": 32}
FLAGS = ["--int4", "--method", "gptq", "--group-size", "32", "--samples", "4", "--seq-len", "32", "--no-report"]


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


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (
            {"int4": True, "group_size": 128},
            "--group-size 128 does not divide the widths of this model's layers, 64 or 96",
        ),
        ({"fp8": True, "block": 128}, "--block 128 does not divide"),
        ({"int4": True, "skip": "*.w1"}, "--skip *.w1 matches no linear layer; they are called like model.layers.0."),
        ({"int4": True, "skip": "*.v_proj"}, "which run as one product: skip all of them or none"),
        ({"int4": True, "skip": "*_proj"}, "leaves nothing to quantize"),
        ({"int4": True, "method": "gptq", "seq_len": 513}, "longer than this model's 512 tokens"),
        ({"int4": True, "method": "gptq", "calibration": "empty"}, "is empty"),
        ({"int4": True, "method": "gptq", "calibration": "short"}, "fewer than one sample of 32"),
        ({"int4": True, "method": "gptq", "calibration": "binary"}, "cannot be read as text"),
        ({"int4": True, "method": "gptq", "calibration": "missing"}, "cannot be read as text"),
    ],
)
def test_what_does_not_go_with_the_model_is_refused_before_any_work(choices, words, tiny_checkpoint, tmp_path):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "short").write_text("word")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    if "calibration" in choices:
        choices = choices | {"calibration": tmp_path / choices["calibration"]}
    with pytest.raises(UserError, match=re.escape(words)):
        made(tiny_checkpoint("llama"), tmp_path / "out", **choices)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({}, "one of --int4, --int8 and --fp8"),
        ({"int4": True, "fp8": True}, "one of --int4, --int8 and --fp8"),
        ({"int8": True, "format": "awq"}, "format awq"),
        ({"int4": True, "format": "awq", "sym": True}, "format awq"),
        ({"fp8": True, "format": "gptq"}, "format gptq"),
        ({"int8": True, "group_size": 64}, "group_size"),
        ({"int4": True, "group_size": 48}, "group_size"),
        ({"int4": True, "block": 128}, "block"),
        ({"int4": True, "desc_act": True}, "desc_act"),
        ({"int4": True, "method": "awq", "desc_act": True, "format": "gptq"}, "desc_act"),
        ({"fp8": True, "block": 128, "method": "gptq"}, "method gptq"),
        ({"fp8": True, "method": "awq"}, "method awq"),
        ({"int8": True, "method": "awq"}, "method awq"),
        ({"fp8": True, "method": "rtn", "samples": 8}, "samples changes nothing"),
        ({"int4": True, "samples": 0}, "samples must be at least 1"),
    ],
)
def test_choices_that_make_no_sense_together_are_refused(choices, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**choices)


def test_a_quantized_model_is_not_quantized_again(tiny_checkpoint, tmp_path):
    once = made(tiny_checkpoint("llama"), tmp_path / "once", fp8=True)
    with pytest.raises(UserError, match="is quantized already"):
        made(once, tmp_path / "twice", fp8=True)


def test_nor_is_one_that_says_so_beside_its_config_as_early_gptq_folders_do(tiny_checkpoint, tmp_path):
    once = made(tiny_checkpoint("llama"), tmp_path / "once", int4=True, method="rtn", format="gptq")
    config = json.loads((once / "config.json").read_text())
    del config["quantization_config"]
    (once / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"is quantized already \(gptq\)"):
        made(once, tmp_path / "twice", fp8=True)


def test_layers_that_are_not_ours_are_refused(tiny_checkpoint, tmp_path):
    source = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"model.layers.0.adapter.weight": torch.ones(4, 4)}, source / "model.safetensors")
    with pytest.raises(UserError, match=re.escape("model.layers.0.adapter.weight")):
        made(source, tmp_path / "out", fp8=True)


def test_too_small_a_disk_is_seen_before_any_work(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(UserError, match=re.escape("has 0.0 GB free, but quantizing takes up to 0.1 GB")):
        made(tiny_checkpoint("llama"), tmp_path / "out", fp8=True)


def test_a_folder_that_is_not_this_checkpoint_is_left_alone(tiny_checkpoint, tmp_path):
    source, other = tiny_checkpoint("llama"), tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already, and is not ours"):
        made(source, other, fp8=True)
    assert files_of(other) == {"notes.txt": b"mine"}
    folder = made(source, tmp_path / "out", fp8=True)
    before = files_of(folder)
    with pytest.raises(UserError, match=r"made otherwise \(int8 False, fp8 True"):
        made(source, folder, int8=True)
    with pytest.raises(UserError, match="made otherwise"):
        made(tiny_checkpoint("llama", intermediate_size=128), folder, fp8=True)
    assert files_of(folder) == before


def test_an_output_that_cannot_be_written_is_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to \(Not a directory\)"):
        made(tiny_checkpoint("llama"), tmp_path / "file" / "out", fp8=True)


def test_what_was_begun_otherwise_is_not_gone_on_with(tiny_checkpoint, tmp_path, monkeypatch):
    source, output = tiny_checkpoint("llama"), tmp_path / "out"
    monkeypatch.setattr(Unfinished, "join_parts", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(source, output, fp8=True)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"begun with other choices \(fp8 True, int8 False"):
        made(source, output, int8=True)
    made(source, output, fp8=True)


def test_two_processes_do_not_make_the_same_checkpoint(tmp_path):
    with Unfinished(tmp_path / "out", {}), pytest.raises(UserError, match="another process is at work in it"):
        Unfinished(tmp_path / "out", {})
