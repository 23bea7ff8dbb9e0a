"""Run by AutoGPTQ's own environment: checkpoints that it writes, and what its layers make of ours.

    python run_auto_gptq.py MODEL THEIRS OURS

Writes THEIRS/<case> of the folder MODEL for each case, with THEIRS/<case>.values: the weights of its linear layers as
AutoGPTQ's layers multiply with them. Does the same for each folder OURS/<case>.
"""

import json
import sys
from pathlib import Path
from typing import Any

GROUP = 32
CASES: dict[str, dict[str, Any]] = {
    "gptq-sym": {"bits": 4, "sym": True, "desc_act": False},
    "gptq-asym": {"bits": 4, "sym": False, "desc_act": False},
    "gptq-desc-act": {"bits": 4, "sym": True, "desc_act": True},
    "gptq-8-bits": {"bits": 8, "sym": True, "desc_act": False},
}


def main(model: Path, theirs: Path, ours: Path) -> None:
    for case, recipe in CASES.items():
        write(model, theirs / case, recipe)
        read(theirs / case)
    for folder in sorted(path for path in ours.iterdir() if path.is_dir()):
        read(folder)


def write(model: Path, folder: Path, recipe: dict[str, Any]) -> None:
    """AutoGPTQ refuses to quantize without a GPU; with its device replaced it does."""
    import torch
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import _base, _utils
    from auto_gptq.modeling.llama import LlamaGPTQForCausalLM
    from transformers import AutoModelForCausalLM

    _base.CUDA_0 = _utils.CUDA_0 = torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    loaded = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32)
    quantizer = LlamaGPTQForCausalLM(loaded, False, BaseQuantizeConfig(group_size=GROUP, **recipe))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 512, (8, 64), generator=generator)
    quantizer.quantize([{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids])
    quantizer.save_quantized(str(folder))


def read(folder: Path) -> None:
    import torch
    from auto_gptq.utils.import_utils import dynamically_import_QuantLinear
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits, group = config["bits"], config["group_size"]
    layer = dynamically_import_QuantLinear(
        use_triton=False, desc_act=config["desc_act"], group_size=group, bits=bits, disable_exllama=True,
        disable_exllamav2=True,
    )  # fmt: skip
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weights = {}
    for name in (name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")):
        dtype = stored[f"{name}.scales"].dtype
        in_features, out_features = len(stored[f"{name}.g_idx"]), stored[f"{name}.scales"].shape[1]
        linear = layer(bits, group, in_features, out_features, bias=False, weight_dtype=dtype)
        kinds = ("qweight", "qzeros", "scales", "g_idx")
        linear.load_state_dict({kind: stored[f"{name}.{kind}"] for kind in kinds})
        weights[f"{name}.weight"] = linear(torch.eye(in_features, dtype=dtype)).T.contiguous()
    save_file(weights, folder.with_suffix(".values"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
