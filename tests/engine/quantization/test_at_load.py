"""What the weights of linear layers become on the way in."""

from pathlib import Path

from engine.quantization.at_load import SCHEMES, RoundedAtLoad, schemes_of_layers
from engine.quantization.formats import read_format
from engine.quantization.weight import Scheme


def test_all_kinds_of_weights_are_found_wherever_they_are(tmp_path: Path):
    """Their kernels are built before a step is captured: none can be in between."""

    def group(target: str, bits: int) -> dict:
        weights = {"type": "int", "num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": True}
        return {"targets": [target], "weights": weights, "format": "pack-quantized"}

    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group("Linear", 4), "group_1": group(r"re:.*layers\.2\.self_attn\.v_proj", 8)},
        "ignore": ["lm_head", "re:.*down_proj", r"re:.*layers\.0\..*"],
    }
    form = read_format(config, tmp_path)
    assert schemes_of_layers(form, num_layers=3) == [Scheme("int", 4, (1, 32)), Scheme("int", 8, (1, 32))]
    assert schemes_of_layers(form, num_layers=1) == []


def test_weights_rounded_at_load_are_of_one_kind():
    assert schemes_of_layers(RoundedAtLoad(SCHEMES["fp8"]), num_layers=2) == [SCHEMES["fp8"]]
