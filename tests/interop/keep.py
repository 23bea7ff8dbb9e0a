"""Keeps a layer of each checkpoint that the libraries wrote, for the normal test run, in tests/data/checkpoints.

    make interop ARGS=--basetemp=.interop/run
    .venv/bin/python -m tests.interop.keep .interop/run

A file holds the layer's tensors as the library stored them, the first rows of its weight as the library dequantizes it
(`dequantized`), and in its metadata the layer's name, its shape and the `quantization_config`.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from engine.quantization.formats import read_format
from tests.interop.test_interop import LIBRARIES

LAYERS = ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj")  # the first that is quantized
NUM_ROWS = 16  # two words of 4-bit numbers that are packed along the outputs
KEPT = Path(__file__).parent.parent / "data/checkpoints"


def main(run: Path) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    for name, library in LIBRARIES.items():
        for case in library.writes:
            folder = run / f"{name}0" / "theirs" / case
            if not folder.with_suffix(".values").exists():
                continue  # of a run with some libraries
            config = json.loads((folder / "config.json").read_text())["quantization_config"]
            config.pop("meta", None)  # how GPTQModel solved it
            quantized = read_format(config, folder)
            layer = next(name for name in LAYERS if quantized.scheme_of(name) is not None)
            stored = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
            tensors = {key: tensor for key, tensor in stored.items() if key.startswith(f"{layer}.")}
            weight = load_file(folder.with_suffix(".values"))[f"{layer}.weight"]
            tensors["dequantized"] = weight[:NUM_ROWS].contiguous()
            metadata = {
                "layer": layer,
                "shape": json.dumps(weight.shape),
                "quantization_config": json.dumps(config),
            }
            save_file(tensors, KEPT / f"{name}-{case}.safetensors", metadata)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
