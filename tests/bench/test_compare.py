"""Engines side by side: fake servers with the command lines of the real ones, and transformers for real."""

import contextlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from math import comb
from pathlib import Path
from typing import Any

import pytest

from bench import compare, report
from bench.adapters import ADAPTERS
from bench.compare import confidence, interval_of_median, run_compare
from bench.config import CompareConfig
from bench.engines import Engine, Trial
from bench.workloads import as_text, random_requests
from engine.config import EngineConfig
from engine.errors import UserError
from engine.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
FAKE_PEER = Path(__file__).with_name("fake_peer.py")
SMALL = {"concurrency": 2, "num_prompts": 2, "input_len": 8, "output_len": 3, "starts": 1, "trials": 1}
MODULES = {"vllm": "vllm.entrypoints.openai.api_server", "sglang": "sglang.launch_server"}
SCRIPTS = {"lmdeploy": "lmdeploy", "tensorrt-llm": "trtllm-serve", "transformers": "transformers"}


@pytest.fixture
def fake_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtual environment in which every engine is installed, version 9.9, and each is the fake one."""
    site, binaries = tmp_path / "site", tmp_path / "env" / "bin"
    binaries.mkdir(parents=True)
    for name, module in MODULES.items():
        file = site.joinpath(*module.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True)
        command = f"[sys.executable, {str(FAKE_PEER)!r}, {name!r}, *sys.argv[1:]]"
        file.write_text(f"import os, sys; os.execv(sys.executable, {command})")
    for adapter in ADAPTERS.values():
        folder = site / f"{adapter.package}-9.9.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {adapter.package}\nVersion: 9.9\n")
    scripts = {script: f'{sys.executable} {FAKE_PEER} {name} "$@"' for name, script in SCRIPTS.items()}
    scripts["python"] = f'env PYTHONPATH={site} {sys.executable} "$@"'
    for script, command in scripts.items():
        (binaries / script).write_text(f"#!/bin/sh\nexec {command}\n")
        (binaries / script).chmod(0o755)
    monkeypatch.setenv("FAKE_PEER_LOG", str(tmp_path / "log"))
    return tmp_path / "env"


def read_log(environment: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (environment.parent / "log").read_text().splitlines()]


def compare_fakes(names: tuple[str, ...], environment: Path, engine: EngineConfig) -> dict[str, dict[str, Any]]:
    options = CompareConfig(engines=names, env=tuple(f"{name}={environment}" for name in names), **SMALL)
    result = run_compare(engine, options, lambda config: [])
    assert result.engines is not None
    return {row["name"]: row for row in result.engines}


def test_every_engine_is_told_the_same_in_its_own_words_and_asked_the_same(fake_environment: Path, tiny_checkpoint):
    model = tiny_checkpoint("llama")
    limits = {"max_model_len": 256, "max_num_seqs": 7, "gpu_memory_utilization": 0.25}
    engine = EngineConfig(model=str(model), dtype="bfloat16", device="cpu", **limits)

    rows = compare_fakes(tuple(ADAPTERS), fake_environment, engine)

    assert {(row["status"], row["version"]) for row in rows.values()} == {("measured", "9.9")}, rows
    log = read_log(fake_environment)
    told = {entry["engine"]: entry["told"] for entry in log if "told" in entry}
    path = str(model.resolve())
    both = {"dtype": "bfloat16", "host": "127.0.0.1"}
    ports = {name: words.pop("port", words.pop("server_port", None)) for name, words in told.items()}
    assert all(int(port) > 0 for port in ports.values())
    assert told["vllm"] == {
        **both, "model": path, "max_model_len": "256", "max_num_seqs": "7", "gpu_memory_utilization": "0.25",
    }  # fmt: skip
    assert told["sglang"] == {
        **both, "model_path": path, "context_length": "256", "max_running_requests": "7",
        "mem_fraction_static": "0.25",
    }  # fmt: skip
    server = {"serve": "serve", "api_server": "api_server", "server_name": "127.0.0.1", "dtype": "bfloat16"}
    assert told["lmdeploy"] == {
        **server, "MODEL": path, "session_len": "256", "max_batch_size": "7", "cache_max_entry_count": "0.25",
    }  # fmt: skip
    assert told["tensorrt-llm"] == {
        "host": "127.0.0.1", "MODEL": path, "max_seq_len": "256", "max_batch_size": "7",
        "kv_cache_free_gpu_memory_fraction": "0.25",
    }  # fmt: skip
    assert told["transformers"] == {
        **both, "serve": "serve", "MODEL": path, "device": "cpu", "continuous_batching": True,
        "cb_max_memory_percent": "0.25",
    }  # fmt: skip
    assert rows["tensorrt-llm"]["note"] == "has no flag for dtype"

    tokenizer = Tokenizer.load(path)
    prompts: dict[str, set[tuple[int, ...]]] = {}
    for entry in (entry for entry in log if "asked" in entry and entry["asked"]["max_tokens"] == 3):
        prompt = entry["asked"]["prompt"]
        token_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        prompts.setdefault(entry["engine"], set()).add(tuple(token_ids))
    measured = [each for each in prompts["vllm"] if all(each in others for others in prompts.values())]
    assert len(measured) == 2  # beside those of the warm-up, which are shuffled words or ids
    assert all(row["figures"]["output_throughput"]["ratio"] > 0 for row in rows.values())


def test_an_engine_that_fails_or_is_missing_is_a_row_that_says_so(
    fake_environment: Path, tiny_checkpoint, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_PEER_FAILS", "vllm")
    engine = EngineConfig(model=str(tiny_checkpoint("llama")), device="cpu")
    environments = tuple(f"{name}={fake_environment}" for name in ("vllm", "sglang"))
    options = CompareConfig(engines=("vllm", "sglang", "lmdeploy"), env=environments, **SMALL)

    result = run_compare(engine, options, lambda config: [])
    failed, measured, missing = result.engines or []

    assert (failed["status"], measured["status"], missing["status"]) == ("failed", "measured", "missing")
    assert failed["reason"].endswith("CUDA error: out of memory")
    assert "--env lmdeploy=PATH" in missing["reason"]
    assert [row[-1].partition(":")[0] for row in report.engine_table(result)[1]] == ["failed", "", "missing"]


def test_an_engine_whose_command_is_not_there_is_a_row_that_says_so(fake_environment: Path, tiny_checkpoint):
    (fake_environment / "bin" / "lmdeploy").unlink()
    engine = EngineConfig(model=str(tiny_checkpoint("llama")), device="cpu")

    rows = compare_fakes(("lmdeploy", "sglang"), fake_environment, engine)

    assert [row["status"] for row in rows.values()] == ["failed", "measured"]
    assert rows["lmdeploy"]["reason"].endswith("bin/lmdeploy cannot be started (No such file or directory)")


def test_of_a_server_that_runs_already_neither_start_nor_memory_is_told(fake_server, tiny_checkpoint):
    options = CompareConfig(engines=(fake_server.url,), **SMALL)

    [row] = run_compare(EngineConfig(model=str(tiny_checkpoint("llama"))), options, lambda config: []).engines or []

    assert (row["status"], row["start_s"], row["memory_bytes"]) == ("measured", [], None)


def test_engines_take_turns_and_are_compared_on_the_same_requests(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint):
    order: list[str] = []
    asked: dict[str, list[Any]] = {"fast": [], "slow": []}

    def engine_with(name: str, rate: float) -> Engine:
        def run_trial(requests: Any, load: Any) -> Trial:
            asked[name].append(requests)
            noise = len(requests[0].prompt) + len(asked[name])  # of the machine, on both alike
            return Trial({"output_throughput": rate * noise, "completed": 2})

        def start(show: Any) -> Any:
            order.append(name)
            return contextlib.nullcontext(run_trial)

        return Engine(name, start)

    monkeypatch.setattr(compare, "find_engines", lambda *_: [engine_with("fast", 3.0), engine_with("slow", 1.0)])
    options = CompareConfig(engines=("vcli",), **SMALL | {"starts": 3, "trials": 2})

    result = run_compare(EngineConfig(model=str(tiny_checkpoint("llama"))), options, lambda config: [])
    slow = (result.engines or [])[1]["figures"]["output_throughput"]

    assert order == ["fast", "slow", "slow", "fast", "fast", "slow"]
    assert asked["fast"] == asked["slow"]
    assert len({str(requests) for requests in asked["fast"]}) == 6
    assert (slow["ratio"], slow["ratio_interval"]) == (pytest.approx(1 / 3), pytest.approx([1 / 3, 1 / 3]))
    assert slow["median"] == 8 + 3.5
    assert result.metrics["num_rounds"] == 6


@pytest.mark.parametrize("num_values", range(1, 30))
def test_the_interval_of_a_median_is_the_narrowest_that_is_sure_enough(num_values: int):
    low, high = interval_of_median(list(range(num_values)))

    # The median is below the low end when at most `low` of the values are: heads of a fair coin.
    def confidence_of(cut: int) -> float:
        return 1 - 2 * sum(comb(num_values, k) for k in range(cut + 1)) / 2**num_values

    assert low == num_values - 1 - high
    assert confidence(num_values) == pytest.approx(confidence_of(int(low)))
    assert confidence(num_values) >= 0.95 or low == 0
    assert confidence_of(int(low) + 1) < 0.95


def test_text_makes_the_tokens_that_were_asked_for(default_model: Path):
    tokenizer = Tokenizer.load(str(default_model))
    requests = random_requests(8, input_len=50, output_len=4, vocab_size=49_000, seed=3, range_ratio=0.5)

    texts = as_text(requests, tokenizer)

    lengths = [len(tokenizer.encode(str(request.prompt))) for request in texts]
    assert lengths == [len(request.prompt) for request in requests]
    assert [request.output_len for request in texts] == [request.output_len for request in requests]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engines": ("vcli", "gpt")}, "--engines gpt: no such engine; there are vcli, vllm, "),
        ({"engines": ("vcli",), "env": ("vcli",)}, "env must be ENGINE=PATH of a virtual environment"),
        ({"engines": ()}, "engines must name at least one"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
    ],
)
def test_a_comparison_that_cannot_be_is_one_sentence(options: dict[str, Any], words: str, default_model):
    with pytest.raises((UserError, ValueError), match=words):
        run_compare(EngineConfig(), CompareConfig(**options), lambda config: [])


def test_the_default_model_is_compared_with_transformers_for_real(default_model, tmp_path: Path):
    engines = ["vcli", "transformers-generate", *(["transformers"] if find_spec("fastapi") else [])]
    load = ["--concurrency", "2", "--num-prompts", "2", "--input-len", "8", "--output-len", "4"]
    load += ["--device", "cpu", "--kv-cache-memory", "32MiB", "--starts", "1", "--trials", "1"]
    load += ["--gpu-memory-utilization", "0.05"]  # by default transformers takes most of the machine's memory
    file, page = tmp_path / "result.json", tmp_path / "result.html"
    command = [sys.executable, "-m", "vcli", "bench", "compare", "--engines", ",".join(engines)]

    done = subprocess.run(
        [*command, *load, "--output", str(file), "--output", str(page)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "VCLI_API_KEY": "of another server"},
        capture_output=True,
        text=True,
        timeout=280,
    )

    assert done.returncode in (0, 4), done.stderr  # 4: this machine was too busy for the client
    rows = json.loads(file.read_text())["engines"]
    assert [(row["name"], row["status"]) for row in rows] == [(name, "measured") for name in engines], rows
    assert all(row["figures"]["output_throughput"]["median"] > 0 and row["memory_bytes"] > 1e8 for row in rows)
    assert "<html" in page.read_text()
    if "transformers" in engines:
        ours, theirs = rows[0]["rounds"][0], rows[2]["rounds"][0]
        assert ours["total_input_tokens"] == theirs["total_input_tokens"]
        assert ours["total_output_tokens"] == theirs["total_output_tokens"] == 8
