"""Results as rows for a table, and as files.

    python -m bench.report RESULT.json RESULT.html

writes a result in another of the FORMATS, and

    python -m bench.report bench/results README.md

the README's tables anew from the JSON files of the folder (bench/readme_tables.py).
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import output
from bench.result import KINDS, BenchResult
from engine.errors import UserError

LATENCIES = (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("E2EL", "e2el"))
# Key, what the person reads, unit. A figure that a run does not have is left out.
FIGURES = (
    ("duration", "duration", "s"),
    ("completed", "requests completed", ""),
    ("failed", "requests failed", ""),
    ("total_input_tokens", "input tokens", ""),
    ("total_output_tokens", "output tokens", ""),
    ("request_throughput", "request throughput", "req/s"),
    ("output_throughput", "output throughput", "tok/s"),
    ("steady_output_throughput", "output throughput, steady", "tok/s"),
    ("total_token_throughput", "total throughput (input + output)", "tok/s"),
    ("request_goodput", "goodput", "req/s"),
    ("prefill_throughput", "prefill throughput", "tok/s"),
    ("decode_throughput", "decode throughput", "tok/s"),
    ("kv_waste_perc", "KV waste, mean", "%"),
    ("peak_kv_waste_perc", "KV waste, peak", "%"),
    ("peak_kv_usage_perc", "KV use, peak", "%"),
    ("prefix_cache_hit_perc", "prefix cache hits", "%"),
    ("num_preemptions", "preemptions", ""),
    ("client_lag_ms", "client lag, p99", "ms"),
    ("client_cpu_perc", "client CPU, of one core", "%"),
)
FILE_KINDS = (*KINDS, "sweep", "latency", "compare", "quality")  # what becomes other files
Table = tuple[list[str], list[list[Any]]]  # column names, rows


def latency_table(result: BenchResult) -> Table:
    """Milliseconds: one row a latency."""
    adjusted = ["adj_p50", "adj_p95", "adj_p99"] if result.metrics.get("failed") else []
    columns = ["mean", "p50", "p95", "p99", *adjusted]
    rows = [
        [label, *(result.metrics.get(f"{column}_{name}_ms") for column in columns)]
        for label, name in LATENCIES
        if f"mean_{name}_ms" in result.metrics
    ]
    return ["ms", *columns], rows


def figure_table(result: BenchResult) -> Table:
    """Everything else, and the comparison with the baseline and the floor."""
    rows = [[label, result.metrics[key], unit] for key, label, unit in FIGURES if result.metrics.get(key) is not None]
    if baseline := result.baseline:
        rows.append(
            [f"{baseline['engine']} generate, batch {baseline['batch_size']}", baseline["output_throughput"], "tok/s"]
        )
        rows.append(["output throughput / baseline", baseline["ratio"], "x"])
    if floor := result.floor:
        rows.append([f"floor of the run on one {floor['device']}", floor["run_s"], "s"])
        rows.append(["floor / duration", floor["run_s"] / result.metrics["duration"] * 100, "%"])
        rows.append(["floor of a decode step", floor["decode_step_ms"], "ms"])
        rows.append(["floor of one prefill", floor["prefill_ms"], "ms"])
    return ["figure", "value", "unit"], rows


def sweep_table(result: BenchResult) -> Table:
    """One row a run of a sweep: throughput against latency."""
    is_closed = "concurrency" in result.runs[0].workload
    columns = ["concurrency" if is_closed else "req/s asked", "output tok/s", "req/s"]
    has_goodput = "request_goodput" in result.runs[0].metrics
    columns += [
        *(["goodput"] if has_goodput else []),
        "TTFT p50 ms",
        "p99",
        "TPOT p50 ms",
        "ITL p50 ms",
        "p99",
        "failed",
    ]
    keys = [*(["request_goodput"] if has_goodput else []), "p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p50_itl_ms"]
    rows = []
    for run in result.runs:
        asked = run.workload["concurrency"] if is_closed else float(run.workload["request_rate"])
        figures = [
            run.metrics[key] for key in ("output_throughput", "request_throughput", *keys, "p99_itl_ms", "failed")
        ]
        rows.append([asked, *figures, "" if run.is_valid else "not valid"])
    return [*columns, ""], rows


def batch_table(result: BenchResult) -> Table:
    """Prefill and decode by batch size, as llama-bench writes it, with a column for each thing that may differ."""
    rows, run = result.metrics["rows"], result.workload
    has_floor = any(row["floor_ms"] for row in rows)
    kept = run["dtype"] if run["quantization"] == "auto" else f"{run['dtype']}, {run['quantization']}"
    columns = ["model", "device", "type", "batch", "test", "tok/s", "ms", *(["floor ms"] if has_floor else [])]
    return columns, [
        [
            *(result.model, run["device"], kept, row["batch_size"], row["test"]),
            f"{format_figure(row['tokens_per_s'])} ± {format_figure(row['std_tokens_per_s'])}",
            *(row["ms"], *([row["floor_ms"]] if has_floor else [])),
        ]
        for row in rows
    ]


def engine_table(result: BenchResult) -> Table:
    """One row an engine: medians with their intervals, and times the reference's; one that has no figures says why."""
    reference = result.metrics["reference"]
    columns = ["engine", "output tok/s", f"x {reference}", "TTFT p50 ms", "TPOT p50 ms", "ITL p99 ms", "start s"]
    rows = []
    for engine in result.engines or []:
        figures, starts = engine["figures"], engine["start_s"]
        throughput = figures.get("output_throughput", {})
        rows.append(
            [
                " ".join(filter(None, [engine["name"], engine["version"]])),
                in_interval(throughput.get("median"), throughput.get("interval")),
                in_interval(throughput.get("ratio"), throughput.get("ratio_interval")),
                *(figures.get(key, {}).get("median") for key in ("p50_ttft_ms", "p50_tpot_ms", "p99_itl_ms")),
                statistics.median(starts) if starts else None,
                engine["memory_bytes"] / 1e6 if engine["memory_bytes"] else None,
                "" if engine["status"] == "measured" else f"{engine['status']}: {engine['reason']}",
            ]
        )
    return [*columns, "memory MB", ""], rows


def in_interval(value: float | None, interval: Sequence[float | None] | None) -> str | None:
    """431.0 (400.0 to 450.0)"""
    if value is None:
        return None
    if not interval or None in interval or interval[0] == interval[1]:
        return format_figure(value)
    return f"{format_figure(value)} ({format_figure(interval[0])} to {format_figure(interval[1])})"


def tables(result: BenchResult) -> list[Table]:
    """What a person is shown of a result; tables without a row are left out."""
    if "rows" in result.metrics:
        return [batch_table(result)]
    if result.engines:
        return [engine_table(result)]
    shown = [sweep_table(result)] if result.runs else [latency_table(result), figure_table(result)]
    return [table for table in shown if table[1]]


def describe(result: BenchResult) -> str:
    """The run in one line: model, workload, machine."""
    return f"{result.model} · {describe_workload(result)} · {describe_machine(result)}"


def describe_machine(result: BenchResult) -> str:
    if host := result.workload.get("remote_host"):
        return f"server at {host}"
    env = result.environment
    return env.get("gpu") or f"{env.get('cpu')} ({env.get('cpu_count')} cores)"


def describe_workload(result: BenchResult) -> str:
    workload = result.workload
    if workload["dataset"] == "random":
        spread = f" ± {workload['range_ratio']:.0%}" if workload.get("range_ratio") else ""
        shape = f"{workload['input_len']}/{workload['output_len']}{spread}"
    else:
        shape = str(workload["dataset"])
    if workload.get("prefix_len"):
        shape = f"{workload['prefix_len']}+{shape}"
    if workload.get("turns"):
        shape += f", {workload['turns']} turns"
    if result.runs:
        return f"{shape}, sweep of {len(result.runs)}"
    if result.kind == "latency":
        return f"{shape} by batch size, offline"
    if result.kind == "throughput":
        return f"{workload['num_prompts']} x {shape}, offline"
    if workload.get("request_rate") is not None:
        how = f"{workload['request_rate']} req/s"
    else:
        how = f"{workload['concurrency']} concurrent" if "concurrency" in workload else "as recorded"
    if workload.get("duration") is not None:
        return f"{shape} for {workload['duration']:g} s, {how}"
    return f"{workload['num_prompts']} x {shape}, {how}"


def check(path: Path, has_requests: bool) -> None:
    """Raise UserError before a long run rather than after it. has_requests: its requests will be known one by one."""
    output.check(path, FORMATS)
    if path.name.endswith(REQUESTS) and not has_requests:
        raise UserError(
            f"--output {path}: only a run against a server has its requests one by one; .csv has the figures"
        )


def write(result: BenchResult, path: Path) -> None:
    """Write a result in the format that the file's name says. Raises UserError."""
    output.write(path, {ending: partial(content, result) for ending, content in FORMATS.items()})


def to_csv(result: BenchResult) -> str:
    """One line a run, an engine or a batch size; names of blocks with dots, such as workload.seed."""
    import pandas as pd

    if "rows" in result.metrics:
        return str(pd.DataFrame(result.metrics["rows"]).assign(**_flat(result)).to_csv(index=False))
    if result.engines:
        flat = _flat(replace(result, engines=None))
        engines = [{k: v for k, v in engine.items() if k not in ("samples", "rounds")} for engine in result.engines]
        return str(pd.json_normalize(engines).assign(**flat).to_csv(index=False))
    frames = [pd.DataFrame([_flat(run)]) for run in result.runs or [result]]
    return str(pd.concat(frames).to_csv(index=False))


def to_requests_csv(result: BenchResult) -> str:
    """One line a request: times in seconds from the start of its run, tokens, and what load it was part of."""
    import pandas as pd

    runs = [run for run in result.runs or [result] if run.samples]
    if not runs:
        raise UserError("the result has no samples: its requests are not known one by one")
    loads = [{k: run.workload[k] for k in ("concurrency", "request_rate") if k in run.workload} for run in runs]
    frames = [
        pd.DataFrame(run.samples["requests"]).assign(**load)
        for run, load in zip(runs, loads, strict=True)
        if run.samples
    ]
    return str(pd.concat(frames).to_csv(index=False))


def to_html(result: BenchResult) -> str:
    from bench import result_page

    return result_page.to_html(result)


def to_svg(result: BenchResult) -> str:
    from bench import result_page

    return result_page.to_svg(result)


def to_png(result: BenchResult) -> bytes:
    from bench.charts import png

    return png(to_svg(result))


def to_markdown(result: BenchResult) -> str:
    parts = [f"### {describe(result)}"]
    parts += [markdown_table(*table) for table in tables(result)]
    parts += [f"`{result.environment.get('command')}`"]
    parts += ["\n".join(f"- {name}: {text}" for name, text in result.definitions.items())]
    return "\n\n".join(parts) + "\n"


REQUESTS = ".requests.csv"  # of what has its requests one by one
FORMATS: dict[str, Callable[[BenchResult], str | bytes]] = {
    ".json": lambda result: result.to_json(with_samples=True),
    ".csv": to_csv,
    REQUESTS: to_requests_csv,
    ".md": to_markdown,
    ".html": to_html,
    ".svg": to_svg,
    ".png": to_png,
}


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---" if index == 0 else "---:" for index in range(len(columns))]]
    lines += [[format_figure(value) for value in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_figure(value: Any) -> str:
    """Three or more digits that count: 12,345 and 123.4 and 1.23."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.1f}" if abs(value) >= 100 else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _flat(result: BenchResult) -> dict[str, Any]:
    """All but definitions, samples and rows, by dotted names."""
    import pandas as pd

    values = {name: value for name, value in result.to_dict().items() if name not in ("definitions", "rows")}
    values["invalid_reasons"] = "; ".join(values.get("invalid_reasons", []))
    values["errors"] = "; ".join(f"{count}x {error}" for error, count in values.get("errors", {}).items())
    return dict(pd.json_normalize(values).iloc[0])


def _rewrite(source: Path, target: Path) -> None:
    result = BenchResult.read(source)
    if result.kind == "quality":
        from bench import quality_report

        quality_report.write_file(quality_report.read(source), target)
    elif result.kind in FILE_KINDS:
        write(result, target)
    else:
        raise UserError(
            f"{source} is of the kind {result.kind or 'unknown'}: only {', '.join(FILE_KINDS)} can be written anew"
        )


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m bench.report RESULT.json FILE, or RESULTS_FOLDER README", file=sys.stderr)
        return 2
    source, target = map(Path, arguments)
    try:
        if source.is_dir():
            from bench.readme_tables import update_readme

            print(f"{target}: {'updated' if update_readme(source, target) else 'already up to date'}")
        else:
            _rewrite(source, target)
    except UserError as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
