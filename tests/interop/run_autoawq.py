"""Run by AutoAWQ's own environment: a checkpoint that it writes, and what its own function unpacks of ours.

    python run_autoawq.py MODEL THEIRS OURS

Writes THEIRS/awq of the folder MODEL, with THEIRS/awq.values: the weights of its linear layers as AutoAWQ dequantizes
them. Does the same for each folder OURS/<case>; AutoAWQ runs nothing on a CPU any more.
"""

import json
import sys
from pathlib import Path
from typing import Any

GROUP = 32
CASES: dict[str, dict[str, Any]] = {
    "awq": {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"},
}


def main(model: Path, theirs: Path, ours: Path) -> None:
    for case, recipe in CASES.items():
        write(model, theirs / case, recipe)
        read(theirs / case)
    for folder in sorted(path for path in ours.iterdir() if path.is_dir()):
        read(folder)


def write(model: Path, folder: Path, recipe: dict[str, Any]) -> None:
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    loaded = AutoAWQForCausalLM.from_pretrained(str(model), device_map="cpu")
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [f"{i} times {j} makes {i * j}" for i in range(16) for j in range(8)]
    loaded.quantize(tokenizer, quant_config=recipe, calib_data=texts, max_calib_samples=128, max_calib_seq_len=64)
    loaded.save_quantized(str(folder))


def read(folder: Path) -> None:
    from awq.utils.packing_utils import dequantize_gemm
    from safetensors.torch import load_file, save_file

    group = json.loads((folder / "config.json").read_text())["quantization_config"]["group_size"]
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weights = {}
    for name in (name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")):
        packed = [stored[f"{name}.{kind}"] for kind in ("qweight", "qzeros", "scales")]
        weights[f"{name}.weight"] = dequantize_gemm(*packed, 4, group).T.contiguous()
    save_file(weights, folder.with_suffix(".values"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
