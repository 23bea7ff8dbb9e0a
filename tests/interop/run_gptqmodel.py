"""Run by GPTQModel's own environment: checkpoints that it writes, and what it and transformers make of ours.

    python run_gptqmodel.py MODEL THEIRS OURS

Writes THEIRS/<case> of the folder MODEL for each case, with THEIRS/<case>.values: the weights of its linear layers as
GPTQModel dequantizes them. Reads each folder OURS/<case> and writes OURS/<case>.values: its weights and its logits, in
GPTQModel and in transformers.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # loading fails with the one of a small machine

PLAIN = {"desc_act": False, "act_group_aware": False}
# No awq: without a GPU GPTQModel writes none, and run_autoawq.py has that case.
CASES: dict[str, dict[str, Any]] = {
    "gptq-v1-sym": {"bits": 4, "sym": True, "format": "gptq", **PLAIN},
    "gptq-v1-asym": {"bits": 4, "sym": False, "format": "gptq", **PLAIN},
    "gptq-v2-asym": {"bits": 4, "sym": False, "format": "gptq_v2", **PLAIN},
    "gptq-v1-desc-act": {"bits": 4, "sym": True, "format": "gptq", "desc_act": True},
    "gptq-v2-asym-desc-act": {"bits": 4, "sym": False, "format": "gptq_v2", "desc_act": True},
    "gptq-v1-act-group-aware": {"bits": 4, "sym": True, "format": "gptq", "desc_act": False, "act_group_aware": True},
    "gptq-v1-8-bits": {"bits": 8, "sym": True, "format": "gptq", **PLAIN},
    "gptq-v1-rows": {"bits": 4, "sym": True, "format": "gptq", "group_size": -1, **PLAIN},
    "gptq-dynamic": {
        "bits": 4, "sym": True, "format": "gptq", **PLAIN,
        "dynamic": {r"-:.*\.0\.mlp\.up_proj": {}, r"+:.*down_proj": {"bits": 8, "group_size": 64}},
    },
}  # fmt: skip
GROUP = 32


def main(model: Path, theirs: Path, ours: Path) -> None:
    for case, recipe in CASES.items():
        write(model, theirs / case, {"group_size": GROUP} | recipe)
        read(theirs / case)
    for folder in sorted(path for path in ours.iterdir() if path.is_dir()):
        read(folder, in_transformers=True)


def write(model: Path, folder: Path, recipe: dict[str, Any]) -> None:
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
            for ids in torch.randint(3, 512, (8, 64), generator=generator)]  # fmt: skip
    loaded = GPTQModel.load(str(model), QuantizeConfig(**recipe), dtype=torch.bfloat16)
    loaded.quantize(data, batch_size=1)
    loaded.save(str(folder))


def read(folder: Path, in_transformers: bool = False) -> None:
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    # The layers that transformers takes know no groups of whole rows, and optimum no layers that are left out.
    in_transformers = in_transformers and config["group_size"] > 0 and not config.get("dynamic")
    tensors, dtype = {}, torch.float16  # of the scales; it knows no float32
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=dtype).model
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            tensors[f"{name}.weight"] = module(torch.eye(module.in_features, dtype=dtype)).T.contiguous()
    ids = torch.arange(3, 35)[None]
    with torch.inference_mode():
        tensors["logits"] = model(ids).logits
        if in_transformers:
            model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=dtype)
            tensors["transformers.logits"] = model(ids).logits
    save_file(tensors, folder.with_suffix(".values"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
