"""The physical floor against figures worked out by hand for Llama-3.1-8B on an H200."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.floor import H200, Floor, find_ceilings
from engine.model_config import ModelConfig
from engine.quantization.weight import ALL, Scheme

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


@pytest.fixture
def floor(tmp_path: Path) -> Floor:
    return make_floor(tmp_path)


def make_floor(folder: Path, **changes: object) -> Floor:
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | changes))
    return Floor(ModelConfig.from_path(folder), "bfloat16", H200)


def test_parameters_and_kv_are_the_published_ones(floor: Floor):
    assert floor.num_decode_params == pytest.approx(7.50e9, rel=0.002)
    assert floor.kv_bytes(1) == 131_072


@pytest.mark.parametrize(("batch", "context", "milliseconds"), [(1, 256, 3.20), (64, 576, 4.2), (256, 576, 9.2)])
def test_a_decode_step_reads_weights_and_kv_or_computes(floor: Floor, batch: int, context: int, milliseconds: float):
    assert floor.decode_step_s(batch, context) * 1e3 == pytest.approx(milliseconds, rel=0.02)


@pytest.mark.parametrize(("num_tokens", "milliseconds"), [(512, 9.5), (2048, 39), (8192, 175)])
def test_a_prompt_costs_its_matrix_work(floor: Floor, num_tokens: int, milliseconds: float):
    assert floor.prefill_s(num_tokens) * 1e3 == pytest.approx(milliseconds, rel=0.02)


def test_a_prompts_parts_are_its_products_and_its_attention(floor: Floor):
    parts = floor.prefill_parts_s(8192)

    # By hand, at 752 TFLOP/s: 2 x 32 x 8,192 tokens x 4,096 x 28,672 numbers, and 4 x 32 x 4,096 x 8,192 ** 2 / 2.
    assert parts["gate_up"] == pytest.approx(81.9e-3, rel=0.01)
    assert parts["attention"] == pytest.approx(23.4e-3, rel=0.01)
    assert set(parts) == {"qkv", "o", "gate_up", "down", "attention"}
    assert sum(parts.values()) == floor.prefill_s(8192)
    rounded = replace(floor, scheme=FP8).prefill_parts_s(8192)
    assert rounded["gate_up"] == pytest.approx(parts["gate_up"] * 752 / 1517)
    assert rounded["attention"] == parts["attention"]


INT4, FP8 = Scheme("int", 4, (1, 128)), Scheme("float", 8, (1, ALL), rounds_inputs=True)


@pytest.mark.parametrize(
    ("scheme", "batch", "context", "milliseconds"),
    [
        (INT4, 1, 256, 0.99),
        (INT4, 64, 576, 2.3),
        (INT4, 256, 576, 9.2),
        (FP8, 1, 256, 1.71),
        (FP8, 64, 576, 2.7),
        (FP8, 256, 576, 6.8),
    ],
)
def test_quantized_weights_are_read_in_their_few_bits(
    floor: Floor, scheme: Scheme, batch: int, context: int, milliseconds: float
):
    found = replace(floor, scheme=scheme)
    assert found.decode_step_s(batch, context) * 1e3 == pytest.approx(milliseconds, rel=0.02)


def test_a_prompt_is_faster_only_where_inputs_are_rounded_too(floor: Floor):
    assert replace(floor, scheme=INT4).prefill_s(8192) == floor.prefill_s(8192)
    assert replace(floor, scheme=FP8).prefill_s(8192) * 1e3 == pytest.approx(98, rel=0.02)


@pytest.mark.parametrize(
    ("num_requests", "lengths", "batch", "seconds"),
    [(320, (512, 128), 64, 5.8), (768, (512, 128), 256, 10.8), (512, (1024, 128), 256, 13.2)],
)
def test_a_run_is_its_prompts_and_its_steps(
    floor: Floor, num_requests: int, lengths: tuple[int, int], batch: int, seconds: float
):
    assert floor.run_s([lengths] * num_requests, batch) == pytest.approx(seconds, rel=0.02)


def test_a_window_bounds_what_is_read_and_computed(tmp_path: Path):
    whole = make_floor(tmp_path)
    windowed = make_floor(tmp_path, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=1024)

    assert windowed.kv_bytes(8192) == whole.kv_bytes(1024)
    assert windowed.kv_bytes(512) == whole.kv_bytes(512)
    assert windowed.prefill_s(8192) < whole.prefill_s(8192)
    assert windowed.prefill_s(1024) == pytest.approx(whole.prefill_s(1024))


def test_only_a_measured_device_has_a_floor():
    assert find_ceilings("NVIDIA H200") is H200
    assert find_ceilings("NVIDIA H100 80GB HBM3") is None
    assert find_ceilings(None) is None
