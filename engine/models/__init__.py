"""Architecture name (config.json) → the class that runs it."""

import torch

from engine.errors import UserError
from engine.layers.placement import Placement
from engine.model_config import ModelConfig
from engine.models.decoder import Model
from engine.models.gemma import Gemma
from engine.models.llama import Llama
from engine.parallel.groups import Group

MODELS: dict[str, type[Model]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Llama,
    "Qwen2ForCausalLM": Llama,
    "Qwen3ForCausalLM": Llama,
    "Phi3ForCausalLM": Llama,
    "SmolLM3ForCausalLM": Llama,
    "Gemma2ForCausalLM": Gemma,
    "Gemma3ForCausalLM": Gemma,
    "Gemma3ForConditionalGeneration": Gemma,
}

__all__ = ["MODELS", "Model", "build_model"]


def build_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    group: Group = Group(),  # noqa: B008 (frozen)
    max_model_len: int | None = None,
) -> Model:
    """The model before its weights; linear layers take their memory when they are loaded.

    max_model_len: the longest sequence that may come.
    """
    for what, count in (("key-value heads", config.num_kv_heads), ("rows of vocabulary", config.vocab_size)):
        if count % group.size:
            raise UserError(f"{count} {what} cannot be split evenly over {group.size} ranks: use fewer")
    placement = Placement(dtype, torch.device(device), group)
    return MODELS[config.architecture](config, max_model_len or config.max_model_len, placement)
