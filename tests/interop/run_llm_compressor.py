"""Run by llm-compressor's own environment: checkpoints that it writes, and what transformers makes of ours.

    python run_llm_compressor.py MODEL THEIRS OURS

Writes THEIRS/<case> of the folder MODEL for each case, with THEIRS/<case>.values: the weights of its linear layers as
transformers dequantizes them. Reads each folder OURS/<case> and writes OURS/<case>.values: its weights and its logits.
"""

import json
import sys
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "int4-sym": {"scheme": "W4A16"},
    "int4-asym": {"scheme": "W4A16_ASYM"},
    "int4-actorder": {"scheme": "W4A16", "actorder": "weight"},
    "int8-rounded-inputs": {"scheme": "W8A8"},
    "fp8-rows": {"scheme": "FP8_DYNAMIC"},
    "fp8-tensor": {"scheme": "FP8"},
    "fp8-blocks": {"scheme": "FP8_BLOCK"},
    "mixed": {},
}
GROUP = 32


def main(model: Path, theirs: Path, ours: Path) -> None:
    for case, recipe in CASES.items():
        write(model, theirs / case, recipe)
        read(theirs / case)
    for folder in sorted(path for path in ours.iterdir() if path.is_dir()):
        read(folder, runs=True)


def write(model: Path, folder: Path, recipe: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(tokenizer), (8, 64), generator=generator)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    common = {"ignore": ["lm_head"]}
    if not recipe:
        modifier = QuantizationModifier(config_groups=_mixed_groups(), **common)
    elif "W4" in recipe["scheme"]:
        groups = {"group_0": _group(["Linear"], 4, symmetric="ASYM" not in recipe["scheme"])}
        groups["group_0"]["weights"]["actorder"] = recipe.get("actorder")
        modifier = GPTQModifier(config_groups=groups, **common)
    else:
        modifier = QuantizationModifier(targets="Linear", scheme=recipe["scheme"], **common)
    oneshot(
        model=loaded, dataset=data, recipe=modifier, num_calibration_samples=8, max_seq_length=64, tokenizer=tokenizer
    )
    loaded.save_pretrained(folder, save_compressed=True)


def _group(targets: list[str], bits: int, symmetric: bool = True) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": GROUP}
    return {"targets": targets, "weights": weights}


def _mixed_groups() -> dict[str, Any]:
    """8 bits in some layers, 4 in others, and the rest as it is."""
    return {"group_0": _group(["re:.*v_proj$"], 8), "group_1": _group(["re:.*mlp.*"], 4)}


def read(folder: Path, runs: bool = False) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

    is_fp8 = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    settings = (FineGrainedFP8Config if is_fp8 else CompressedTensorsConfig)(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=settings)
    tensors = {
        f"{name}.weight": module.weight.detach().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    if runs:
        with torch.inference_mode():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
            tensors["logits"] = model(torch.arange(3, 35)[None]).logits
    save_file(tensors, folder.with_suffix(".values"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
