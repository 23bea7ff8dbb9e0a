"""Published configs, old and new in form, become the same typed numbers."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.model_config import ModelConfig, RopeConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(folder: Path, config: dict, generation: dict | None = None) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_path(folder)


def test_a_llama_is_read(tmp_path):
    config = read(tmp_path, LLAMA)
    assert (config.head_dim, config.num_kv_heads, config.max_model_len) == (128, 8, 131072)
    assert (config.dtype, config.eos_token_ids) == ("bfloat16", (128001,))
    assert config.layer_windows == (0, 0, 0, 0)
    assert config.attention_scale == pytest.approx(128**-0.5)
    assert config.layer_ropes[0] == RopeConfig(10000.0, 128)
    assert not config.tie_word_embeddings


def test_both_forms_of_rope_settings_mean_the_same(tmp_path):
    old = read(tmp_path, LLAMA | {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING})
    older = {("type" if key == "rope_type" else key): value for key, value in LLAMA3_SCALING.items()}
    oldest = read(tmp_path, LLAMA | {"rope_theta": 500000.0, "rope_scaling": older})
    new = read(tmp_path, LLAMA | {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 500000.0}, "dtype": "bfloat16"})
    assert old == oldest == new
    assert old.layer_ropes[0].kind == "llama3"
    assert (old.layer_ropes[0].theta, old.layer_ropes[0].original_max_len) == (500000.0, 8192)


def test_all_end_tokens_of_both_files_count(tmp_path):
    config = read(tmp_path, LLAMA | {"eos_token_id": [128001, 128009]}, {"eos_token_id": [128008, 128009]})
    assert config.eos_token_ids == (128008, 128009, 128001)


def test_qwen_has_windows_only_when_told_to_use_them(tmp_path):
    qwen = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "max_window_layers": 3}
    assert read(tmp_path, qwen).layer_windows == (0, 0, 0, 0)
    assert read(tmp_path, qwen | {"use_sliding_window": False}).layer_windows == (0, 0, 0, 0)
    assert read(tmp_path, qwen | {"use_sliding_window": True}).layer_windows == (0, 0, 0, 4096)
    assert read(tmp_path, qwen).qkv_bias
    assert not read(tmp_path, qwen).o_bias


def test_mistral_has_its_window_unless_it_says_none(tmp_path):
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"]}
    assert read(tmp_path, mistral).layer_windows == (4096,) * 4
    assert read(tmp_path, mistral | {"sliding_window": None}).layer_windows == (0,) * 4


def test_gemma_2_alternates_and_caps(tmp_path):
    gemma = LLAMA | {"architectures": ["Gemma2ForCausalLM"], "head_dim": 256, "query_pre_attn_scalar": 224}
    config = read(tmp_path, gemma | {"hidden_act": "gelu_pytorch_tanh", "sliding_window": 64})
    assert config.layer_windows == (64, 0, 64, 0)
    assert (config.attention_softcap, config.final_softcap, config.activation) == (50.0, 30.0, "gelu_tanh")
    assert config.attention_scale == pytest.approx(224**-0.5)
    assert config.embedding_scale == 64.0
    assert config.tie_word_embeddings


GEMMA3_4B = {  # as published: what equals a default is left out
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152},
}


def test_the_text_part_of_a_gemma_3_that_sees_is_read(tmp_path):
    config = read(tmp_path, GEMMA3_4B)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (34, 8, 4, 256)
    assert (config.vocab_size, config.max_model_len, config.eos_token_ids) == (262208, 131072, (1, 106))
    assert config.layer_windows[:7] == (1024, 1024, 1024, 1024, 1024, 0, 1024)
    assert config.layer_ropes[0] == RopeConfig(10000.0, 256)
    full = config.layer_ropes[5]
    assert full is not None
    assert (full.theta, full.kind, full.factor) == (1e6, "linear", 8.0)


def test_gemma_3_in_the_new_form_says_the_same(tmp_path):
    old = read(tmp_path, GEMMA3_4B)
    text = {key: value for key, value in GEMMA3_4B["text_config"].items() if key != "rope_scaling"}
    text["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    text["layer_types"] = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(34)]
    assert read(tmp_path, GEMMA3_4B | {"text_config": text}) == old


PHI4_MINI = LLAMA | {
    "architectures": ["Phi3ForCausalLM"],
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "sliding_window": 262144,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
}


def test_phi_4_mini_rotates_a_part_and_scales_its_attention(tmp_path):
    rope = read(tmp_path, PHI4_MINI).layer_ropes[0]
    assert rope is not None
    assert (rope.kind, rope.rotary_dim, rope.original_max_len, rope.factor) == ("longrope", 96, 4096, 32.0)
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def test_longrope_with_the_wrong_number_of_factors_is_refused(tmp_path):
    fails(tmp_path, PHI4_MINI | {"partial_rotary_factor": 1.0}, "64", "48")


def test_yarn_reaches_as_far_as_it_stretches(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read(tmp_path, LLAMA | {"max_position_embeddings": 32768, "rope_scaling": yarn})
    assert config.max_model_len == 131072
    rope = config.layer_ropes[0]
    assert rope is not None
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_smollm_3_leaves_every_fourth_layer_without_positions(tmp_path):
    config = read(tmp_path, LLAMA | {"architectures": ["SmolLM3ForCausalLM"]})
    assert [rope is None for rope in config.layer_ropes] == [False, False, False, True]


def fails(folder: Path, config: dict, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        read(folder, config)
    for word in words:
        assert word in str(caught.value)


def test_what_is_wrong_with_a_config_is_told(tmp_path):
    fails(tmp_path, LLAMA | {"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM", "LlamaForCausalLM", "Gemma3")
    fails(tmp_path, {}, "names no architecture", str(tmp_path))
    fails(tmp_path, LLAMA | {"hidden_size": "many"}, "hidden_size", "'many'")
    fails(tmp_path, {key: value for key, value in LLAMA.items() if key != "vocab_size"}, "vocab_size")
    fails(tmp_path, LLAMA | {"num_key_value_heads": 5}, "32 attention heads", "5 key-value heads")
    fails(tmp_path, LLAMA | {"hidden_act": "relu"}, "'relu'", "silu")
    fails(tmp_path, LLAMA | {"torch_dtype": "int8"}, "'int8'", "bfloat16")
    fails(tmp_path, LLAMA | {"rope_scaling": {"rope_type": "spiral"}}, "'spiral'", "yarn")
    fails(tmp_path, LLAMA | {"rope_scaling": 8}, "rope_scaling")
    fails(tmp_path, LLAMA | {"quantization_config": "gptq"}, "quantization_config", "'gptq'")


def test_a_config_that_is_no_json_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        ModelConfig.from_path(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        ModelConfig.from_path(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="JSON object"):
        ModelConfig.from_path(tmp_path)


def test_reading_a_config_imports_no_torch(default_model):
    code = f"""
import sys
from pathlib import Path
from engine.model_config import ModelConfig
print(ModelConfig.from_path(Path({str(default_model)!r})).hidden_size, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["576", "False"], done.stderr


def test_the_authors_sampling_defaults_are_read(tmp_path):
    recommended = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    assert dict(read(tmp_path, LLAMA, recommended).default_sampling) == recommended
    assert dict(read(tmp_path, LLAMA, {"do_sample": False}).default_sampling) == {"temperature": 0.0}
    assert dict(read(tmp_path, LLAMA, {}).default_sampling) == {}
