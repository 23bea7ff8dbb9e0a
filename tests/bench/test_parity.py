"""What counts as equal, as a tie and as an error, and a real comparison with a tiny model."""

import json
from pathlib import Path

import pytest
import torch

from bench import parity
from bench.parity_prompts import PROMPTS


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


def test_equal_tokens_that_are_the_best_ones_are_equal():
    result = parity.compare([0, 1], [0, 1], logits([20.0, 1.0, 0.0], [3.0, 9.0, 1.0]), "bfloat16")

    assert result["verdict"] == "equal"
    assert (result["first_difference"], result["worst_ulps"]) == (None, 0.0)


def test_two_candidates_within_rounding_are_a_tie():
    result = parity.compare([0, 1], [0, 0], logits([20.0, 1.0], [20.0, 19.875]), "bfloat16")

    assert result["verdict"] == "tie"
    assert (result["first_difference"], result["num_other"]) == (1, 1)
    assert result["difference_ulps"] == 1.0  # between 16 and 32 a bf16 number's neighbour is 0.125 away


def test_the_same_gap_is_an_error_in_fp32():
    result = parity.compare([0, 1], [0, 0], logits([20.0, 1.0], [20.0, 19.875]), "float32")

    assert result["verdict"] == "error"


def test_a_bad_token_after_a_tie_is_an_error():
    tokens, theirs = [1, 0, 1], [0, 0, 0]

    result = parity.compare(tokens, theirs, logits([20.0, 19.875], [5.0, 1.0], [20.0, 2.0]), "bfloat16")

    assert result["verdict"] == "error"
    assert (result["first_difference"], result["worst_position"], result["num_other"]) == (0, 2, 2)


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [(1.0, "bfloat16", 2**-7), (-20.0, "bfloat16", 0.125), (1.0, "float32", 2**-23), (3.0, "float16", 2**-9)],
)
def test_ulp_is_the_spacing_of_the_type(value: float, dtype: str, expected: float):
    assert parity.ulp(value, dtype) == expected


def test_the_prompts_are_many_and_of_mixed_length():
    lengths = sorted(len(prompt.split()) for prompt in PROMPTS)

    assert len(set(PROMPTS)) >= 20
    assert lengths[0] <= 6
    assert lengths[-1] >= 250


def test_a_tiny_model_says_what_transformers_says(tiny_checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "parity.json"
    model = str(tiny_checkpoint("llama", max_position_embeddings=4096))
    arguments = [model, "--device", "cpu", "--num-prompts", "3", "--max-tokens", "12", "--output", str(output)]

    code = parity.main(arguments)

    result = json.loads(output.read_text())
    assert code == 0
    assert (result["equal"], result["errors"]) == (3, 0)
    assert result["dtype"] == "float32"
    assert result["environment"]["torch"]
    assert "3 equal" in capsys.readouterr().out
