"""`vcli quantize` from outside: a checkpoint, a report, a gate."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def quantize(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vcli", "quantize", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


def test_a_checkpoint_comes_with_its_report_and_does_not_pass_a_gate_that_is_too_narrow(tiny_checkpoint, tmp_path):
    text = tmp_path / "text"
    text.write_text("To be or not to be, that is the question. " * 100)
    output = tmp_path / "out"
    flags = ["--int8", "--method", "rtn", "-o", output, "--text", text, "--windows", "1", "--device", "cpu"]
    done = quantize(tiny_checkpoint("llama"), *flags, "--max-kl", "0")
    assert done.returncode == 3, done.stderr
    assert "layer 1 of 2" in done.stderr
    assert f"{output} is there" in done.stderr
    assert "perplexity" in done.stdout
    report = json.loads((output / "quality.json").read_text())
    assert report["kl"]["mean"] > 0
    assert report["recipe"]["name"] == "int8 rtn"
    errors = [layer["error"] for layer in report["layers"] if layer["part"] == "mlp.down_proj"]
    assert len(errors) == 2
    assert all(0 < error < 1e-3 for error in errors)
    card = (output / "README.md").read_text()
    assert "perplexity" in card
    assert (output / "quality.html").is_file()
    again = quantize(tiny_checkpoint("llama"), *flags, "--max-kl", "1")
    assert again.returncode == 0, again.stderr
    assert "layer 1 of 2" not in again.stderr, "the checkpoint is there already; it is only measured"
