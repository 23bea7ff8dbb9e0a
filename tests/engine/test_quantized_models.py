"""Models with quantized weights say what transformers says with the numbers that those weights stand for."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint import open_checkpoint
from engine.errors import UserError
from engine.layers.weights import GroupedWeight, RoundedWeight, SplitWeight
from engine.llm import LLM
from engine.model_config import ModelConfig
from engine.models import Model, build_model
from engine.parallel.groups import Group
from engine.quantization.at_load import find_format
from engine.quantization.formats import make_format
from engine.quantization.weight import ALL, QuantizedWeight, Scheme, round_to_nearest
from engine.sampling_params import SamplingParams
from tests.engine.forward import run, transformers_logits

CPU = torch.device("cpu")
NUM_TOKENS = 20
INT4 = Scheme("int", 4, (1, 32))
SCHEMES = {
    "gptq": ("gptq", INT4),
    "gptq, zeros": ("gptq", replace(INT4, is_symmetric=False)),
    "gptq, activation order": ("gptq", replace(INT4, is_symmetric=False)),
    "gptq, 8 bits": ("gptq", replace(INT4, bits=8)),
    "awq": ("awq", replace(INT4, is_symmetric=False)),
    "int4": ("compressed-tensors", INT4),
    "int4, zeros": ("compressed-tensors", replace(INT4, is_symmetric=False)),
    "int8, weights only": ("compressed-tensors", Scheme("int", 8, (1, ALL))),
    "fp8, weights only": ("compressed-tensors", Scheme("float", 8, (1, ALL))),
}
ROUNDED = {
    "int8": ("compressed-tensors", Scheme("int", 8, (1, ALL), rounds_inputs=True)),
    "fp8": ("compressed-tensors", Scheme("float", 8, (1, ALL), rounds_inputs=True)),
    "fp8, one scale": ("compressed-tensors", Scheme("float", 8, (ALL, ALL), rounds_inputs=True)),
    "fp8, blocks": ("fp8", Scheme("float", 8, (32, 32), rounds_inputs=True)),
}
MODELS = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {}, "gemma3": {}, "phi3": {}}

Made = tuple[Path, Path]  # a quantized checkpoint, and one with the numbers that its weights stand for


@pytest.fixture
def quantize(tiny_checkpoint, tmp_path) -> Callable[..., Made]:
    """quantize(family, case, ignored layers, shuffle): shuffle(layer) seeds its inputs' places in the groups."""

    def make(family: str, case: str, ignored: tuple[str, ...] = (), shuffle: Callable[[str], int] = len) -> Made:
        name, scheme = (SCHEMES | ROUNDED)[case]
        act_order = "activation order" in case
        source = tiny_checkpoint(family, **MODELS[family])
        form = make_format(name, scheme, act_order=act_order, ignored=ignored)
        stored, plain = {}, {}
        for key, tensor in load_file(source / "model.safetensors").items():
            layer = key.removesuffix(".weight")
            if "_proj.weight" not in key or layer in ignored:
                stored[key] = plain[key] = tensor
                continue
            weight = quantized(tensor, scheme, shuffle(layer) if act_order else None, form.scale_dtype(torch.float32))
            stored |= form.write(layer, weight, torch.float32)
            plain[key] = weight.dequantize()
        folders = tmp_path / "quantized", tmp_path / "plain"
        for folder, tensors in zip(folders, (stored, plain), strict=True):
            shutil.copytree(source, folder)
            save_file(tensors, folder / "model.safetensors")
        config = json.loads((source / "config.json").read_text())
        (folders[0] / "config.json").write_text(json.dumps(config | {"quantization_config": form.config()}))
        return folders

    return make


def quantized(tensor: Tensor, scheme: Scheme, seed: int | None, scale_dtype: torch.dtype) -> QuantizedWeight:
    weight = round_to_nearest(tensor, scheme)
    group_of = None
    if seed is not None:
        order = torch.randperm(tensor.shape[1], generator=torch.Generator().manual_seed(seed))
        group_of = (order // scheme.block[1]).int()
    return replace(weight, scales=weight.scales.to(scale_dtype), group_of=group_of)


def load(path: Path, group: Group | None = None, quantization: str = "auto", load_format: str = "auto") -> Model:
    config = ModelConfig.from_path(path)
    model = build_model(config, torch.float32, CPU, group or Group())
    with open_checkpoint(path, load_format, linear_format=find_format(config, quantization, path)) as ckpt:
        model.load(ckpt)
    return model


def some_tokens() -> Tensor:
    return torch.randint(3, 512, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("case", SCHEMES)
def test_logits_are_those_of_the_numbers_that_weights_stand_for(family, case, quantize):
    folder, plain = quantize(family, case)
    expected = transformers_logits(plain, some_tokens())
    for chunks in ([NUM_TOKENS], [7, *[1] * (NUM_TOKENS - 7)]):
        torch.testing.assert_close(run(load(folder), some_tokens(), chunks), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("case", ROUNDED)
def test_inputs_are_rounded_token_by_token(family, case, quantize):
    """The oracle rounds in float64. Now and then a number lies so near the middle of two that they part there."""
    folder, plain = quantize(family, case)
    _, scheme = ROUNDED[case]
    expected = rounding_logits(plain, some_tokens(), scheme)
    error = run(load(folder), some_tokens(), [NUM_TOKENS]) - expected
    without = transformers_logits(plain, some_tokens()) - expected
    assert error.norm() < 0.1 * without.norm(), (error.norm(), without.norm())


def rounding_logits(path: Path, token_ids: Tensor, scheme: Scheme) -> Tensor:
    """What transformers says, in float64, if all inputs of linear layers but the last are rounded as `scheme` says."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float64)
    columns = scheme.block[1]

    def rounded(module: torch.nn.Module, args: tuple[Tensor]) -> Tensor:
        return torch.cat([nearest(part, scheme) for part in args[0].split(columns or args[0].shape[-1], -1)], -1)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(rounded)
    with torch.inference_mode():
        return model(token_ids.unsqueeze(0)).logits[0].float()


def nearest(x: Tensor, scheme: Scheme) -> Tensor:
    """Each number of x as the nearest there is, of all 255 times a scale."""
    if scheme.kind == "int":
        grid = torch.arange(-127, 128, dtype=torch.float64)
    else:
        positive = [m / 8 * 2**-6 for m in range(8)] + [
            (1 + m / 8) * 2 ** (e - 7) for e in range(1, 16) for m in range(8)
        ]
        positive = positive[:-1]  # the last is not a number
        grid = torch.tensor([-v for v in positive[:0:-1]] + positive, dtype=torch.float64)
    scales = x.abs().amax(-1, keepdim=True) / grid.max()
    middles = (grid[1:] + grid[:-1]) / 2
    return grid[torch.bucketize(x / scales, middles)] * scales


@pytest.mark.parametrize("case", ["gptq, activation order", "awq", "int8, weights only"])
def test_the_whole_engine_draws_the_tokens_of_the_plain_weights(case, quantize):
    folder, plain = quantize("qwen3", case)
    options = {"device": "cpu", "dtype": "float32", "kv_cache_memory": 1 << 20}
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    prompts = [{"prompt_token_ids": list(range(10, 10 + length))} for length in (1, 5, 40)]
    found, expected = (LLM(str(path), **options).generate(prompts, params, use_tqdm=False) for path in (folder, plain))
    assert [one.outputs[0].token_ids for one in found] == [one.outputs[0].token_ids for one in expected]


def test_an_early_checkpoint_says_how_it_is_quantized_in_a_file_of_its_own(quantize):
    folder, plain = quantize("llama", "gptq, zeros")
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    del quantization["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(quantization))
    expected = transformers_logits(plain, some_tokens())
    torch.testing.assert_close(run(load(folder), some_tokens(), [NUM_TOKENS]), expected, atol=2e-4, rtol=2e-4)


# --- one product or several


def test_projections_of_one_kind_are_one_product(quantize):
    folder, _ = quantize("llama", "gptq, activation order", shuffle=lambda name: 3)
    layer = load(folder).layers[0]
    for linear in (layer.attention.qkv_proj, layer.mlp.gate_up_proj):
        assert isinstance(linear.weight, GroupedWeight)
        assert linear.weight.order is not None


def test_projections_whose_groups_differ_are_products_of_their_own(quantize):
    folder, plain = quantize("llama", "gptq, activation order", shuffle=lambda name: "kug".find(name[-6]))
    model = load(folder)
    assert isinstance(model.layers[0].attention.qkv_proj.weight, SplitWeight)
    expected = transformers_logits(plain, some_tokens())
    torch.testing.assert_close(run(model, some_tokens(), [NUM_TOKENS]), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("case", ["gptq", "int8", "fp8, blocks"])
def test_layers_that_are_not_quantized_stay_as_they_are(case, quantize):
    ignored = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")
    folder, plain = quantize("llama", case, ignored)
    _, scheme = (SCHEMES | ROUNDED)[case]
    model = load(folder)
    tensor = model.layers[1].mlp.down_proj.weight.tensor
    assert torch.equal(tensor, load_file(plain / "model.safetensors")["model.layers.1.mlp.down_proj.weight"])
    assert isinstance(model.layers[0].attention.qkv_proj.weight, SplitWeight)
    if not scheme.rounds_inputs:
        expected = transformers_logits(plain, some_tokens())
        torch.testing.assert_close(run(model, some_tokens(), [NUM_TOKENS]), expected, atol=2e-4, rtol=2e-4)


def test_a_quantized_head_says_the_same(quantize):
    folder, plain = quantize("llama", "gptq")
    change_config(folder, lm_head=True)
    tensors, dense = load_file(folder / "model.safetensors"), load_file(plain / "model.safetensors")
    weight = quantized(tensors.pop("lm_head.weight"), INT4, None, torch.float16)
    stored = make_format("gptq", INT4).write("lm_head", weight, torch.float32)
    save_file(tensors | stored, folder / "model.safetensors")
    save_file(dense | {"lm_head.weight": weight.dequantize()}, plain / "model.safetensors")
    expected = transformers_logits(plain, some_tokens())
    torch.testing.assert_close(run(load(folder), some_tokens(), [NUM_TOKENS]), expected, atol=2e-4, rtol=2e-4)


# --- ranks


class SoloGroup(Group):
    """A rank that keeps its partial results: the test puts them together."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("case", ["gptq, zeros", "awq", "int8, weights only", "int4", "fp8, weights only"])
def test_what_two_ranks_compute_sums_up_to_the_whole(family, case, quantize, tiny_checkpoint, monkeypatch):
    monkeypatch.setitem(MODELS, family, {"intermediate_size": 128})
    folder, _ = quantize(family, case)
    whole, *ranks = load(folder), load(folder, SoloGroup(0, 2)), load(folder, SoloGroup(1, 2))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        found = sum(rank.layers[1].mlp(x) for rank in ranks)
        torch.testing.assert_close(found, whole.layers[1].mlp(x), atol=1e-5, rtol=1e-4)
        parts = [model.layers[1].attention.qkv_proj(x).split([32, 16, 16], 1) for model in ranks]
        together = torch.cat([part[i] for i in range(3) for part in parts], 1)
        torch.testing.assert_close(together, whole.layers[1].attention.qkv_proj(x), atol=1e-5, rtol=1e-4)


def test_ranks_that_would_share_a_group_are_told(quantize):
    folder, _ = quantize("llama", "gptq")
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.down_proj.* input 48, inside a block of 32.*fewer"):
        load(folder, SoloGroup(1, 2))


def test_mixed_groups_are_not_split(quantize):
    folder, _ = quantize("llama", "gptq, activation order")
    with pytest.raises(UserError, match=r"o_proj: its groups hold inputs from anywhere.*use one rank"):
        load(folder, SoloGroup(0, 2))


# --- without a quantized checkpoint


@pytest.mark.parametrize("case", [*SCHEMES, *ROUNDED])
def test_dummy_weights_are_of_the_scheme_and_keep_a_signal(case, quantize):
    folder, _ = quantize("llama", case)
    (folder / "model.safetensors").unlink()
    model, again = load(folder, load_format="dummy"), load(folder, load_format="dummy")
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        y = model.layers[0].mlp.gate_up_proj.weight.apply(x, None)
        assert torch.equal(y, again.layers[0].mlp.gate_up_proj.weight.apply(x, None))
        assert not torch.equal(y, model.layers[1].mlp.gate_up_proj.weight.apply(x, None))
    assert y.std().item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("case", ["fp8", "int8"])
def test_plain_weights_are_rounded_as_they_load(case, quantize, tiny_checkpoint):
    folder, _ = quantize("llama", case)
    stored, rounded = load(folder), load(tiny_checkpoint("llama", **MODELS["llama"]), quantization=case)
    for a, b in zip(stored.layers, rounded.layers, strict=True):
        for x, y in ((a.attention.qkv_proj, b.attention.qkv_proj), (a.mlp.down_proj, b.mlp.down_proj)):
            assert isinstance(y.weight, RoundedWeight)
            assert torch.equal(x.weight.numbers.view(torch.int8), y.weight.numbers.view(torch.int8))
            assert torch.equal(x.weight.scales, y.weight.scales)
            assert torch.equal(x.bias, y.bias)


def test_an_engine_rounds_weights_when_it_is_told_to(default_model):
    """A GGUF file's too. Rounded inputs cost the small default model much with int8, and little with fp8."""
    llm = LLM(str(default_model), quantization="fp8", device="cpu", kv_cache_memory=16 << 20, max_model_len=256)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (answer,) = llm.chat(question, SamplingParams(temperature=0.0, max_tokens=8), use_tqdm=False)
    assert "Paris" in answer.outputs[0].text


# --- what can be wrong


def test_a_quantized_model_is_not_rounded_again(quantize):
    folder, _ = quantize("llama", "awq")
    with pytest.raises(UserError, match=r"--quantization fp8: .* is quantized already \(awq\): leave the flag out"):
        load(folder, quantization="fp8")


def test_an_unknown_method_is_refused_by_name(quantize):
    folder, _ = quantize("llama", "awq")
    change_config(folder, quant_method="bitsandbytes")
    with pytest.raises(UserError, match=r"'bitsandbytes' are not supported; supported: compressed-tensors, gptq"):
        load(folder)


def test_a_weight_that_cannot_be_run_is_told_by_name(quantize):
    folder, _ = quantize("llama", "int8")
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": numbers | {"strategy": "group", "group_size": 32},
        "input_activations": numbers | {"strategy": "token", "dynamic": True},
    }
    change_config(folder, config_groups={"group_0": group})
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj: .*groups of 32.*cannot be run"):
        load(folder)


def test_results_that_depend_on_the_batch_are_not_called_invariant(quantize):
    folder, _ = quantize("llama", "awq")
    with pytest.raises(UserError, match="--batch-invariant knows plain weights only"):
        LLM(str(folder), device="cpu", batch_invariant=True)


def test_a_missing_or_wrong_tensor_is_named(quantize):
    folder, _ = quantize("llama", "gptq")
    file = folder / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.up_proj.qweight"
    for wrong, words in (
        (tensors[name][1:], f"{name} has shape .*7, 96.*asks for .*8, 96"),
        (tensors[name].float(), f"{name} is stored as float32, but its config asks for int32"),
        (None, f"has no tensor {name}"),
    ):
        changed = {key: tensor for key, tensor in tensors.items() if key != name or wrong is not None}
        save_file(changed if wrong is None else changed | {name: wrong.contiguous()}, file)
        with pytest.raises(UserError, match=words):
            load(folder)


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))
