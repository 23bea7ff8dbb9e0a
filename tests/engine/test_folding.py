"""Scales that a layer's weights are multiplied with, and that are taken back before: the layer stays what it was."""

import pytest
import torch

from engine import kv_cache
from engine.calibration import prompts
from engine.checkpoint import open_checkpoint
from engine.folding import find_makers
from engine.model_config import ModelConfig
from engine.models import build_model
from engine.products import load_part, products

TOKENS = torch.arange(3, 35, dtype=torch.int32).view(2, 16)


@pytest.mark.parametrize("heads", [2, 4], ids=["shared values", "a value head each"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3"])
def test_a_layer_does_the_same_with_scaled_weights(family, heads, tiny_checkpoint):
    source = tiny_checkpoint(family, num_key_value_heads=heads)
    config = ModelConfig.from_path(source)
    model = build_model(config, torch.float32, torch.device("cpu"), max_model_len=16)
    with open_checkpoint(source) as ckpt:
        noted = load_part(model, 1, ckpt, ckpt.reads)
    layer = model.layers[0]
    hidden = torch.randn(TOKENS.numel(), config.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = run(layer, hidden)
    found = list(products(layer, noted))
    makers = find_makers(layer, found, {}, torch.float32)
    for product in found:
        maker = makers[product.linear]
        scales = 0.5 + torch.rand(product.weight.shape[1], generator=torch.Generator().manual_seed(1))
        product.weight.mul_(maker.divide(maker.tie(scales)))
    torch.testing.assert_close(run(layer, hidden), expected, rtol=1e-4, atol=1e-4)


def run(layer, hidden):
    batch = prompts(TOKENS, torch.device("cpu"))
    kv_cache.allocate([layer.attention], batch.block_table.numel(), torch.float32, torch.device("cpu"))
    residual = torch.zeros_like(hidden)
    heads = layer.attend(hidden, residual, batch)
    return layer.transform(heads, residual) + residual
