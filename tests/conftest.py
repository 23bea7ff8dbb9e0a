"""What many tests share: tiny checkpoints of every family, made on the spot, and the default model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TinyCheckpoint = Callable[..., Path]

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPOILT_TOKEN = 300
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # family: transformers' name of it, and what it does differently
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 32, "sliding_window": 8, "num_hidden_layers": 4, "sliding_window_pattern": 3},
    ),
    "phi3": ("Phi3", {}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--schemathesis-examples", type=int, default=4, help="bodies for each route of the server's API")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """tiny_checkpoint(family, **config fields): a folder with random weights, tokenizer and chat template.

    The same call gives the same folder again; do not write to it.
    """
    made: dict[str, Path] = {}

    def make(family: str = "llama", dtype: str = "float32", max_shard_size: str = "1GB", **overrides: Any) -> Path:
        key = json.dumps([family, dtype, max_shard_size, overrides], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            _save_model(folder, family, dtype, max_shard_size, overrides)
            save_tokenizer(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def spoilt_checkpoint(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama, but for the embedding of token SPOILT_TOKEN, which is NaN."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("spoilt")
    shutil.copytree(tiny_checkpoint(), folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][SPOILT_TOKEN] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The GGUF file that `vcli serve` runs when no model is named; fetched once."""
    from engine.hub import resolve_model

    return resolve_model("")


def _save_model(folder: Path, family: str, dtype: str, max_shard_size: str, overrides: dict[str, Any]) -> None:
    """Weights of the scale that keeps a signal's variance, so that greedy outputs vary with their prompt."""
    import torch
    import transformers

    name, habits = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SHAPE | habits | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
        for parameter_name, weight in model.named_parameters():
            is_matrix = weight.dim() == 2
            torch.nn.init.normal_(weight, 0 if is_matrix else weight.mean().item(), weight.shape[-1] ** -0.5)
            if "embed_tokens" in parameter_name and not config.tie_word_embeddings:
                torch.nn.init.normal_(weight)
    model.generation_config.eos_token_id = [2, 0]
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 512 tokens, trained on this very file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(Path(__file__).read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
