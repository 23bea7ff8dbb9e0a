"""Every family says what transformers says on the same weights, however the prompt is cut and the cache is laid out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import open_checkpoint
from engine.errors import UserError
from engine.model_config import FAMILIES, ModelConfig
from engine.models import MODELS, Model, build_model
from engine.parallel.groups import Group
from tests.engine.forward import run, transformers_logits

CPU = torch.device("cpu")
NUM_TOKENS = 20

LINEAR = {"rope_type": "linear", "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
YARN_MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16, "beta_slow": 2, "truncate": False}


def longrope(num_frequencies: int) -> dict[str, object]:
    short = [1.0 + 0.1 * i for i in range(num_frequencies)]
    long = [1.5 + 0.7 * i for i in range(num_frequencies)]
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long}


CASES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama without shared heads": ("llama", {"num_key_value_heads": 4}),
    "llama with wide heads": ("llama", {"head_dim": 32}),
    "llama linear": ("llama", {"rope_scaling": LINEAR}),
    "llama dynamic": ("llama", {"rope_scaling": DYNAMIC}),
    "llama 3.1": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500.0}),
    "llama yarn": ("llama", {"rope_scaling": YARN}),
    "llama yarn with all options": ("llama", {"rope_scaling": YARN_MSCALE}),
    "mistral with a window": ("mistral", {}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3 yarn": ("qwen3", {"rope_scaling": YARN, "attention_bias": True}),
    "gemma2": ("gemma2", {}),
    "gemma2 without soft caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2 with tight soft caps": ("gemma2", {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3", {}),
    "gemma3 linear": ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "phi3": ("phi3", {"sliding_window": 8}),
    "phi3 longrope, short": ("phi3", {"rope_scaling": longrope(8), "original_max_position_embeddings": 512}),
    "phi3 longrope, long": ("phi3", {"rope_scaling": longrope(8), "original_max_position_embeddings": 12}),
    "phi4-mini": (
        "phi3",
        {
            "partial_rotary_factor": 0.75,
            "rope_scaling": longrope(6),
            "original_max_position_embeddings": 12,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("smollm3", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case, tiny_checkpoint):
    family, overrides = CASES[case]
    path = tiny_checkpoint(family, **overrides)
    token_ids = torch.randint(3, 512, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    expected = transformers_logits(path, token_ids)
    for chunks in ([NUM_TOKENS], [7, 5, *[1] * (NUM_TOKENS - 12)]):
        found = run(load(path), token_ids, chunks)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert len(set(expected.argmax(-1).tolist())) > NUM_TOKENS // 2, "an oracle that always says the same proves little"


def load(path: Path, max_model_len: int | None = None) -> Model:
    model = build_model(ModelConfig.from_path(path), torch.float32, CPU, max_model_len=max_model_len)
    with open_checkpoint(path) as ckpt:
        model.load(ckpt)
    return model


def test_dynamic_scaling_settles_on_the_longest_sequence_that_may_come(tiny_checkpoint):
    """A sequence of just that length has the frequencies that transformers gives it, from its first token on."""
    path = tiny_checkpoint("llama", rope_scaling=DYNAMIC, max_position_embeddings=12)
    token_ids = torch.arange(10, 10 + NUM_TOKENS)
    expected = transformers_logits(path, token_ids)
    torch.testing.assert_close(run(load(path, NUM_TOKENS), token_ids, [9, 11]), expected, atol=2e-4, rtol=2e-4)


def test_longrope_is_short_for_an_engine_that_stays_within_the_original_length(tiny_checkpoint):
    path = tiny_checkpoint("phi3", rope_scaling=longrope(8), original_max_position_embeddings=NUM_TOKENS)
    token_ids = torch.arange(10, 10 + NUM_TOKENS)
    expected = transformers_logits(path, token_ids)
    torch.testing.assert_close(run(load(path, NUM_TOKENS), token_ids, [9, 11]), expected, atol=2e-4, rtol=2e-4)
    stretched = run(load(path), token_ids, [9, 11])
    assert not torch.allclose(stretched, expected, atol=0.1), "with a longer limit the long factors hold for all"


@pytest.mark.parametrize("prefix", ["language_model.model", "model.language_model"])
def test_the_text_part_of_a_gemma_3_that_sees_runs(prefix, tiny_checkpoint, tmp_path):
    path = tiny_checkpoint("gemma3", tie_word_embeddings=True)
    text = json.loads((path / "config.json").read_text())
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    tensors = load_file(path / "model.safetensors")
    renamed = {name.replace("model", prefix, 1): tensor for name, tensor in tensors.items()}
    save_file(renamed | {"vision_tower.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    token_ids = torch.arange(10, 10 + NUM_TOKENS)
    assert torch.equal(run(load(tmp_path), token_ids, [NUM_TOKENS]), run(load(path), token_ids, [NUM_TOKENS]))


def test_heads_that_ranks_cannot_share_evenly_are_told(tiny_checkpoint):
    config = ModelConfig.from_path(tiny_checkpoint("llama"))
    with pytest.raises(UserError, match="2 key-value heads cannot be split evenly over 4 ranks"):
        build_model(config, torch.float32, CPU, Group(0, 4))


def test_every_family_that_can_be_read_can_be_built():
    assert set(MODELS) == set(FAMILIES)
