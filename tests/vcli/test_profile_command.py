"""`vcli profile` from the outside, with a tiny model."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--device", "cpu", "--max-num-seqs", "8", "--kv-cache-memory", "16MiB"]
LOAD = ["--concurrency", "2", "--input-len", "16", "--output-len", "8", "--duration", "400ms"]


def run_profile(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "vcli", "profile", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_tiny_models_time_is_told_part_by_part_and_kept(tiny_checkpoint, tmp_path: Path):
    output, trace = tmp_path / "profile.json", tmp_path / "traces" / "trace.json"

    code, out, err = run_profile(
        str(tiny_checkpoint("llama")), *SMALL, *LOAD, "--output", str(output), "--trace", str(trace)
    )

    assert code == 0, err
    assert all(
        f"\n{part}" in out for part in ("attention", "gate_up", "schedule", "all", "forward", "KV cache", "weights")
    )
    assert "measured on this device: read" in out
    result = json.loads(output.read_text())
    assert 0.98 <= sum(part["share"] for part in result["parts"]) <= 1.001
    assert 0.98 <= result["coverage"] <= 1.02
    if result["check"]:
        assert f"Tried: {result['check']['verdict']}." in out
    assert any(event["name"] == "paged_attention" for event in json.loads(trace.read_text())["traceEvents"])


def test_what_cannot_be_watched_is_one_sentence(tiny_checkpoint):
    code, _, err = run_profile(str(tiny_checkpoint("llama")), *SMALL, *LOAD, "--input-len", "600", "--no-check")
    assert code == 1
    assert "a request has 608 tokens (input and output), the model has room for 512" in err

    code, _, err = run_profile(str(tiny_checkpoint("llama")), "--trace", "/dev/null/traces/trace.json")
    assert code == 1
    assert err.endswith("--trace /dev/null/traces/trace.json: cannot be written (Not a directory)\n")

    code, _, err = run_profile("--trace", "trace.txt")
    assert code == 2
    assert "--trace must end in .json or .json.gz, got trace.txt" in err


def test_a_server_is_watched_under_the_load_of_others(start_server, tiny_checkpoint):
    server = start_server("--kv-cache-memory", "16MiB", model=tiny_checkpoint("llama")).wait_ready()
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            server.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 64, "ignore_eos": True})

    client = threading.Thread(target=ask)
    client.start()
    try:
        code, out, err = run_profile("--url", server.url, "--duration", "2s", "--json")
    finally:
        is_over.set()
        client.join()

    assert code == 0, err
    result = json.loads(out)
    assert result["num_steps"] > 10
    assert 0.9 <= result["coverage"] <= 1.1  # a reading may be a step late
    assert result["stages"]["forward"] > result["stages"]["update"] > 0
    assert result["advice"]


def test_a_server_that_nobody_has_asked_yet_is_idle(start_server, tiny_checkpoint, tmp_path: Path):
    server = start_server("--kv-cache-memory", "16MiB", model=tiny_checkpoint("llama")).wait_ready()
    page = tmp_path / "page.html"

    code, out, err = run_profile("--url", server.url, "--duration", "500ms", "--output", str(page))

    assert code == 0, err
    assert "100% of the time no request is there" in page.read_text()
    assert "The bottleneck is not the engine: 100% of the time no request is there." in out


def test_a_model_or_a_load_and_a_server_exclude_each_other(tiny_checkpoint):
    code, _, err = run_profile(str(tiny_checkpoint("llama")), "--url", "http://127.0.0.1:9")

    assert code == 2
    assert "MODEL and --url exclude each other" in err

    code, _, err = run_profile("--url", "http://127.0.0.1:9", "--input-len", "600")

    assert code == 2
    assert "--url and --input-len exclude each other" in err
