"""Results made by hand, and READMEs that they are put into."""

from pathlib import Path
from typing import Any

from bench import readme_tables
from bench.metrics import RequestRecord, serving_metrics
from bench.result import BenchResult


def make_result(num_failed: int = 0, **changes: object) -> BenchResult:
    records = [RequestRecord(float(i), [(i + 0.5, 1), (i + 0.6, 1)], i + 0.7, 16) for i in range(4)]
    records += [RequestRecord(0.0, ended=1.0, error="HTTP 500: oh")] * num_failed
    values = {
        "kind": "serving",
        "model": "tiny",
        "workload": {
            "dataset": "random",
            "num_prompts": 4,
            "input_len": 16,
            "output_len": 2,
            "range_ratio": 0.0,
            "concurrency": 2,
            "seed": 0,
        },
        "metrics": {**serving_metrics(records), "valid": True, "invalid_reasons": [], "errors": {}},
        "environment": {
            "gpu": None,
            "cpu": "A CPU",
            "cpu_count": 2,
            "command": "vcli bench tiny",
            "git_revision": "abc",
        },
    }
    return BenchResult(**(values | changes))


def make_samples() -> dict[str, Any]:
    """Two requests of three and two tokens, and one that failed."""
    requests = {
        "sent": [0.0, 0.5, 0.6],
        "ttft": [0.2, 0.3, None],
        "e2el": [0.4, 0.4, None],
        "num_prompt_tokens": [16, 16, 0],
        "num_output_tokens": [3, 2, 0],
        "error": ["", "", "HTTP 500: oh"],
    }
    server = {"time": [0.0, 0.5], "num_requests_waiting": [1.0, 0.0], "kv_cache_usage_perc": [0.25, 0.5]}
    return {"requests": requests, "gaps": [0.1, 0.1, 0.1], "server": server, "window": None}


def make_sweep() -> BenchResult:
    runs = []
    for concurrency in (1, 16):
        run = make_result(samples=make_samples())
        run.workload = {**run.workload, "concurrency": concurrency}
        runs.append(run)
    runs[1].metrics = {**runs[1].metrics, "valid": False}
    return BenchResult("sweep", "tiny", {"dataset": "random", "input_len": 16, "output_len": 2}, runs=runs)


def make_engine(name: str, throughput: float | None, ratio: float = 1.0, **changes: Any) -> dict[str, Any]:
    """One engine of a comparison; without a throughput it was not measured."""
    figures, rounds, samples = {}, [], None
    if throughput is not None:
        figures = {
            "output_throughput": make_figure(throughput, ratio),
            "p50_ttft_ms": make_figure(1e4 / throughput, 1 / ratio),
            "p50_tpot_ms": make_figure(2e3 / throughput, 1 / ratio),
            "p99_itl_ms": make_figure(5e3 / throughput, 1 / ratio),
        }
        rounds, samples = [{"failed": 0}] * 6, make_samples()
    values = {
        "name": name,
        "version": "1.2" if rounds else None,
        "command": f"{name} serve tiny" if rounds else "",
        "status": "measured" if rounds else "missing",
        "reason": "" if rounds else f"no {name} is installed: pip install {name}",
        "start_s": [8.0, 9.5] if rounds else [],
        "memory_bytes": 5e8 if rounds else None,
        "figures": figures,
        "rounds": rounds,
        "samples": samples,
    }
    return values | changes


def make_figure(median: float, ratio: float) -> dict[str, Any]:
    def around(value: float) -> list[float]:
        return [0.95 * value, 1.1 * value]

    is_reference = ratio == 1.0
    ratio_interval = [1.0, 1.0] if is_reference else around(ratio)
    return {"median": median, "interval": around(median), "ratio": ratio, "ratio_interval": ratio_interval}


def make_comparison(*engines: dict[str, Any]) -> BenchResult:
    default = (make_engine("vcli", 400.0), make_engine("transformers", 200.0, ratio=0.5), make_engine("vllm", None))
    metrics = {"reference": "vcli", "num_rounds": 6, "confidence": 0.97, "valid": True}
    return make_result(kind="compare", metrics=metrics, engines=list(engines or default))


def section_marks(kind: str) -> str:
    """What a README has for the tables of a kind: old ones."""
    begin, end = readme_tables.marks(kind)
    return f"{begin}\nold\n{end}\n"


def updated_readme(results: Path, text: str) -> str:
    """A README with this text after an update; a second one changes nothing."""
    readme = results / "README.md"
    readme.write_text(text)
    assert readme_tables.update_readme(results, readme)
    once = readme.read_text()
    assert not readme_tables.update_readme(results, readme)
    assert readme.read_text() == once
    return once
