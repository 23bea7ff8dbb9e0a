"""The model that `make serve` runs, against transformers on the same weights."""

import json
import subprocess
import sys


def test_logits_and_greedy_tokens_of_20_prompts_equal_those_of_transformers(default_model, tmp_path):
    """64 tokens each, prompts of 6 to 400 tokens, batched freely here and one by one there, fp32."""
    report = tmp_path / "parity.json"
    options = ["--device", "cpu", "--dtype", "float32", "--num-prompts", "20", "--max-tokens", "64"]
    run = subprocess.run(
        [sys.executable, "-m", "bench.parity", str(default_model), *options, "--output", str(report)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    prompts = json.loads(report.read_text())["prompts"]
    assert len(prompts) == 20
    assert all(prompt["num_tokens"] == 64 for prompt in prompts)
    assert all(prompt["verdict"] == "equal" for prompt in prompts), [prompt["verdict"] for prompt in prompts]
    assert max(prompt["worst_ulps"] for prompt in prompts) == 0, "each token is the best of transformers' logits too"
