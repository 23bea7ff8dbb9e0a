"""`vcli bench gate` from the outside, and a real regression of the engine that it has to find."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Every step of the engine takes three times as long.
SLOWER = """
import time
_step = EngineCore.step
def _slow_step(self):
    start = time.perf_counter()
    outputs = _step(self)
    time.sleep(2 * (time.perf_counter() - start))
    return outputs
EngineCore.step = _slow_step
"""


def run_gate(*arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vcli", "bench", "gate", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture
def slower_checkout(tmp_path: Path) -> Path:
    """A clone of this checkout whose engine is slower than its last commit."""
    clone = tmp_path / "clone"
    if subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, clone], check=False).returncode:
        pytest.skip("not a git checkout")
    core = clone / "engine" / "core.py"
    core.write_text(core.read_text() + SLOWER)
    return clone


def test_a_slower_step_is_found_beside_the_commit_before_it(slower_checkout: Path, tiny_checkpoint, tmp_path: Path):
    files = [tmp_path / "gate.json", tmp_path / "gate.xml", tmp_path / "gate.md"]
    load = ["--concurrency", "4", "--num-prompts", "4", "--input-len", "32", "--output-len", "16", "--device", "cpu"]
    limits = ["--metric", "p50_itl<=+25%", "--kv-cache-memory", "16MiB", "--budget", "250s"]

    done = run_gate(
        *(str(tiny_checkpoint("llama", dtype="float32")), *load, *limits, "--against", "HEAD"),
        *(part for file in files for part in ("--output", str(file))),
        root=slower_checkout,
    )

    assert done.returncode == 3, done.stdout + done.stderr
    assert "regressed (" in done.stdout
    result = json.loads(files[0].read_text())
    assert (result["verdict"], result["num_starts"]) == ("regressed", 2)
    assert result["limits"][0]["measured"] > 0.25
    assert "with changes" in result["after"]
    assert ET.fromstring(files[1].read_text()).get("failures") == "1"
    assert "| p50_itl<=+25% |" in files[2].read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 1, "a gate needs something to hold this code against: --baseline FILE or --against REV"),
        (["--against", "HEAD", "--concurrency", "0"], 2, "--concurrency must be at least 1, got 0"),
        (["--against", "HEAD", "--budget", "0s"], 2, "--budget must be more than 0, got 0"),
        (["--against", "HEAD", "--output", "gate.pdf"], 1, "the extension must be one of .json, .xml, .md"),
        (["--against", "HEAD", "--metric", "speed>=0%"], 1, "no figure is called speed"),
    ],
)
def test_a_mistake_is_one_sentence(vcli, arguments: list[str], code: int, words: str):
    done = vcli("bench", "gate", *arguments)

    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_called_gate_can_still_be_measured(vcli):
    assert vcli("bench", "./gate").stderr.startswith("vcli: ./gate: no such file or folder")
