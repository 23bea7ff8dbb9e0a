"""`vcli bench` from the outside: its flags, its exit codes, and runs with a tiny model behind a real server."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from bench import result_page
from bench.result import BenchResult
from engine.config import EngineConfig
from vcli.bench import serve_arguments

ROOT = Path(__file__).resolve().parents[2]
SMALL_RUN = ["--device", "cpu", "--max-num-seqs", "8", "--kv-cache-memory", "16MiB"]


def start_bench(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vcli", "bench", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Where the tests run in the background, their children would be born deaf to Ctrl-C.
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=hear, **pipes)


def run_bench(*arguments: str) -> tuple[int, str, str]:
    process = start_bench(*arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_a_tiny_model_is_served_measured_and_stopped(tiny_checkpoint, tmp_path: Path):
    output = tmp_path / "result.json"
    load = ["--concurrency", "4", "--num-prompts", "10", "--input-len", "20", "--output-len", "6"]

    code, out, err = run_bench(str(tiny_checkpoint("llama")), *SMALL_RUN, *load, "--output", str(output))

    result = json.loads(output.read_text())
    assert code == (0 if result["valid"] else 4), err
    assert (result["completed"], result["failed"]) == (10, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (200, 60)
    assert result["mean_ttft_ms"] < result["mean_e2el_ms"]
    assert result["kv_waste_perc"] is None or 0 <= result["kv_waste_perc"] < 100
    assert all(word in out for word in ("TTFT", "p99", "output throughput", "request sent → first content token"))
    assert "measuring" in err


def test_a_sweep_measures_one_server_at_every_point(tiny_checkpoint, tmp_path: Path):
    output = tmp_path / "sweep.json"
    load = ["--concurrency", "1-4x4", "--duration", "1s", "--input-len", "20", "--output-len", "6", "--slo", "ttft=1h"]

    code, out, err = run_bench(str(tiny_checkpoint("llama")), *SMALL_RUN, *load, "--output", str(output))

    sweep = json.loads(output.read_text())
    assert code == (0 if all(run["valid"] for run in sweep["runs"]) else 4), err
    assert [run["workload"]["concurrency"] for run in sweep["runs"]] == [1, 4]
    assert [run["workload"]["seed"] for run in sweep["runs"]] == [0, 1]
    assert [run["duration"] for run in sweep["runs"]] == pytest.approx([1.0, 1.0])
    assert all(run["request_goodput"] == run["completed"] for run in sweep["runs"])
    assert all(run["samples"]["requests"]["sent"] for run in sweep["runs"])
    assert re.search(r"^concurrency +output tok/s", out, re.MULTILINE)
    assert "2 of 2: measuring" in err
    assert err.count("starting the server") == 1
    page = result_page.to_html(BenchResult.read(output))
    titles = ("TTFT, ms", "Requests per second", "ITL: percent within", "KV cache in use, %")
    assert all(f'aria-label="{title}"' in page for title in titles)


def test_batch_sizes_make_a_table_to_paste(tiny_checkpoint):
    flags = ["--offline", "--batch-size", "1,2", "--input-len", "8", "--output-len", "3"]

    code, out, err = run_bench(str(tiny_checkpoint("llama")), *SMALL_RUN, *flags)

    assert code == 0, err
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert [line.split("|")[5].strip() for line in table[2:]] == ["pp8", "tg3 @ 8"] * 2
    assert {line.count("|") for line in table} == {8}
    assert re.fullmatch(r"\|( -+[-:] \|)+", table[1])


def test_json_goes_to_stdout_alone(tiny_checkpoint):
    load = ["--concurrency", "2", "--num-prompts", "4", "--input-len", "8", "--output-len", "3", "--offline", "--json"]

    code, out, err = run_bench(str(tiny_checkpoint("llama")), *SMALL_RUN, *load)

    assert code == 0, err
    assert json.loads(out)["total_output_tokens"] == 12


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_bench_leaves_no_server_behind(tiny_checkpoint, stop: signal.Signals):
    load = ["--concurrency", "2", "--num-prompts", "100000", "--input-len", "8", "--output-len", "64"]
    bench = start_bench(str(tiny_checkpoint("llama")), *SMALL_RUN, *load)
    assert bench.stderr is not None
    for line in bench.stderr:
        if "measuring" in line:
            break
    family = psutil.Process(bench.pid).children(recursive=True)
    assert family

    bench.send_signal(stop)
    bench.communicate(timeout=60)

    assert bench.returncode == 128 + stop
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_a_server_that_dies_under_the_load_is_an_error_with_its_last_words(tiny_checkpoint):
    load = ["--concurrency", "2", "--num-prompts", "100000", "--input-len", "8", "--output-len", "64"]
    bench = start_bench(str(tiny_checkpoint("llama")), *SMALL_RUN, *load)
    assert bench.stderr is not None
    for line in bench.stderr:
        if "measuring" in line:
            break
    time.sleep(0.5)

    psutil.Process(bench.pid).children()[0].kill()
    _, err = bench.communicate(timeout=100)

    assert bench.returncode == 1
    assert "the server ended with exit code -9" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["/nowhere/at/all"], 1, "/nowhere/at/all"),
        (["--concurrency", "0"], 2, "--concurrency must be at least 1, got 0"),
        (["--concurrency", "2", "--request-rate", "3"], 2, "exclude each other"),
        (["--request-rate", "-1"], 2, "--request-rate must be more than 0"),
        (["--concurrency", "1,2", "--baseline", "transformers"], 2, "--baseline needs one --concurrency"),
        (["--batch-size", "1,8"], 2, "--batch-size needs --offline"),
        (["--offline", "--batch-size", "0"], 2, "--batch-size must be at least 1, got 0"),
        (
            ["--offline", "--batch-size", "1", "--prefix-len", "9"],
            2,
            "--batch-size and --prefix-len exclude each other",
        ),
        (["--duration", "0"], 2, "--duration must be more than 0, got 0"),
        (["--turns", "2", "--offline"], 2, "--turns and --offline exclude each other"),
        (["--burstiness", "2"], 2, "--burstiness needs --request-rate"),
        (["--request-rate", "inf", "--duration", "5s"], 2, "exclude each other"),
        (["--slo", "speed=5ms"], 2, "--slo knows ttft, tpot, itl, e2el; got speed"),
        (["--offline", "--duration", "5s"], 2, "--offline and --duration exclude each other"),
        (["--url", "http://127.0.0.1:1", "--offline"], 2, "exclude each other"),
        (["--url", "http://127.0.0.1:1"], 1, "no OpenAI-compatible server answers at http://127.0.0.1:1"),
        (["--output", "result.xls"], 1, "the extension must be one of"),
        (["--offline", "--output", "a.requests.csv"], 1, "only a run against a server has its requests one by one"),
        (["compare", "--output", "a.requests.csv"], 1, "only a run against a server has its requests one by one"),
        (["--baseline", "magic"], 2, "--baseline must be none or transformers"),
    ],
)
def test_a_mistake_is_one_sentence(vcli, arguments: list[str], code: int, message: str):
    done = vcli("bench", *arguments)

    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("vcli: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dataset_that_cannot_be_read_is_told_before_a_server_starts(tiny_checkpoint):
    code, _, err = run_bench(str(tiny_checkpoint("llama")), "--dataset", "nowhere.jsonl")

    assert code == 1
    assert err == "vcli: --dataset nowhere.jsonl: no such file; give a file, or `random`\n"


def test_the_server_is_started_with_what_differs_from_the_defaults():
    config = EngineConfig(
        model="m", dtype="bfloat16", enable_prefix_caching=False, max_num_seqs=7, kv_cache_memory=4096
    )

    assert serve_arguments(config) == [
        *("m", "--dtype", "bfloat16", "--max-num-seqs", "7", "--kv-cache-memory", "4096"),
        "--no-enable-prefix-caching",
    ]


def test_help_needs_no_heavy_import():
    code = (
        "import sys, vcli.bench; print([name for name in ('torch', 'transformers', 'pandas') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_two_checkpoints_are_compared_and_a_gate_that_is_not_passed_is_exit_code_3(tiny_checkpoint, tmp_path: Path):
    model, page = str(tiny_checkpoint("llama")), tmp_path / "quality.html"
    flags = [*SMALL_RUN, "--windows", "1", "--quantization", "fp8", "--output", str(page)]

    code, out, err = run_bench("--quality", model, model, *flags, "--max-kl", "1e-9", "--max-ppl-increase", "50")

    assert code == 3, err
    assert "perplexity" in out
    assert "tok/s" in out
    assert page.read_text().startswith("<!doctype html>")
    last = err.strip().splitlines()[-1]
    assert re.fullmatch(r"vcli: the mean KL divergence is 0\.\d+ nats a token: --max-kl allows 1e-09", last)


def test_the_comparison_as_json_goes_to_stdout_alone(tiny_checkpoint):
    model = str(tiny_checkpoint("llama"))

    code, out, err = run_bench("--quality", model, model, *SMALL_RUN, "--windows", "1", "--json", "--max-kl", "0")

    assert code == 0, err
    assert json.loads(out)["perplexity"]["before"] == json.loads(out)["perplexity"]["after"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--quality", "BEFORE"], 2, "--quality needs two checkpoints: vcli bench --quality BEFORE AFTER"),
        (["--max-kl", "1"], 2, "belong to --quality BEFORE AFTER"),
        (["--quality", "BEFORE", "AFTER", "--offline"], 2, "--quality and --offline exclude each other"),
        (["--quality", "BEFORE", "AFTER", "--windows", "0"], 2, "--windows must be at least 1, got 0"),
        (["--quality", "BEFORE", "AFTER", "--max-kl", "-1"], 2, "--max-kl must be at least 0, got -1"),
        (["--quality", "./nowhere", "./elsewhere"], 1, "./nowhere: no such file or folder"),
        (["--quality", "BEFORE", "AFTER", "--output", "a.pdf"], 1, "the extension must be one of"),
    ],
)
def test_a_comparison_that_cannot_be_is_one_sentence(vcli, arguments: list[str], code: int, words: str):
    done = vcli("bench", *arguments)

    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
