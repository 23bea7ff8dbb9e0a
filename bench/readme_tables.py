"""The README's tables, made from the JSON files of results and put between their marker comments.

`python -m bench.report bench/results README.md` does it; running it twice changes nothing.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import paging
from bench.environment import short_revision
from bench.figures import PEER
from bench.quality_report import quality_section
from bench.report import describe_machine, describe_workload, format_figure, markdown_table
from bench.result import KINDS, BenchResult
from engine.errors import UserError


def marks(kind: str) -> tuple[str, str]:
    """Between which a kind of result goes."""
    return f"<!-- {kind}:begin -->", f"<!-- {kind}:end -->"


def update_readme(results_folder: Path, readme: Path) -> bool:
    """Put the tables of all valid results between their markers. True when the file changed."""
    text = readme.read_text(encoding="utf-8")
    read = [(path, BenchResult.read(path)) for path in sorted(results_folder.glob("*.json"))]
    results = [result for _, result in read if result.kind in KINDS and result.is_valid]
    sections = {"results": results_table(results) if results else "No results yet."}
    for kind, section_of in SECTIONS.items():
        if paths := [path for path, result in read if result.kind == kind]:
            sections[kind] = section_of(paths)
    updated = text
    for kind, section in sections.items():
        updated = _put_between(updated, *marks(kind), section, readme)
    if updated != text:
        readme.write_text(updated, encoding="utf-8")
    return updated != text


def _put_between(text: str, begin: str, end: str, section: str, readme: Path) -> str:
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise UserError(f"{readme} needs the lines {begin} and {end}: the results go between them")
    return f"{before}{begin}\n{section}\n{end}{after}"


def results_table(results: list[BenchResult]) -> str:
    """The README's table: one line a run, and below it the commands."""
    columns = ["model", "workload", "machine", "output tok/s", "TTFT p50 / p99 ms", "TPOT p50 ms", "ITL p99 ms"]
    columns += ["KV waste %", "x transformers", "% of floor", "revision"]
    rows = []
    for result in results:
        figures, env = result.metrics, result.environment
        ttft = [format_figure(figures.get(f"p{p}_ttft_ms")) for p in (50, 99)] if "p50_ttft_ms" in figures else ["-"]
        rows.append(
            [
                result.model,
                describe_workload(result),
                describe_machine(result),
                figures["output_throughput"],
                " / ".join(ttft),
                figures.get("p50_tpot_ms"),
                figures.get("p99_itl_ms"),
                figures.get("kv_waste_perc"),
                result.baseline["ratio"] if result.baseline else None,
                result.floor["run_s"] / figures["duration"] * 100 if result.floor else None,
                short_revision(env),
            ]
        )
    commands = "\n".join(str(result.environment.get("command")) for result in results)
    return f"{markdown_table(columns, rows)}\n\nThe commands, line by line:\n\n```bash\n{commands}\n```"


def speed_table(rows: list[dict[str, Any]]) -> str:
    """The rows of bench/speed.py: a table for each model, each figure beside its floor, the peer's and the target."""
    columns = ["measured", "unit", "floor", PEER, "target", "", "revision"]
    verdicts = {True: "met", False: "**missed**", None: ""}
    keys = ["figure", "value", "unit", "floor", "peer", "target"]
    tables = []
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        lines = [[*(row[key] for key in keys), verdicts[row["met"]], (row["git_revision"] or "-")[:9]] for row in own]
        tables.append(markdown_table([f"{model}, {dtype}", *columns], lines))
    return "\n\n".join(tables)


def speed_section(path: Path) -> str:
    """What the README says of a file of bench/speed.py."""
    values = json.loads(path.read_text(encoding="utf-8"))
    env, rows = values["environment"], values["rows"]
    machine = f"{env['gpu']}, driver {env['driver']}, torch {env['torch']}"
    parts = [f"{machine}:", speed_table(rows)]
    for model, shares in values["time"].items():
        parts += [f"Where the time of a decode step of {model} at batch 64 goes:", time_table(shares)]
    for model, timeline in values["start"].items():
        parts += [f"A second start of `vcli serve {model}`:", "\n".join(["```text", *timeline, "```"])]
    return "\n\n".join([*parts, f"```bash\n{env['command']}\n```"])


def time_table(shares: list[dict[str, Any]]) -> str:
    """Where the time of a step goes: a line for each part (bench/trace.py), and their sum."""
    columns = ["part", "us a step", "floor", "launches", "kernels"]
    rows = [[s["part"], s["us"], s["floor_us"], round(s["launches"]), ", ".join(s["kernels"])] for s in shares]
    floors = [share["floor_us"] for share in shares if share["floor_us"] is not None]
    launches = round(sum(share["launches"] for share in shares))
    total = ["all", sum(share["us"] for share in shares), sum(floors) if floors else None, launches, ""]
    return markdown_table(columns, [*rows, total])


def kernels_section(path: Path) -> str:
    """What the README says of a file of bench/kernels.py."""
    values = json.loads(path.read_text(encoding="utf-8"))
    env, ceilings = values["environment"], values["ceilings"]
    read, copied, flops = (ceilings[f"{name}_per_s"] / 1e12 for name in ("read_bytes", "copied_bytes", "flops"))
    columns = ["op", "shape", "us", "TB/s", "TFLOP/s", "of the ceiling", "x PyTorch"]
    rows = [
        [
            row["op"],
            row["shape"],
            row["us"],
            row["tb_per_s"],
            row["tflop_per_s"] or None,
            f"{row['share']:.0%} of {row['bound']}",
            row["ratio"],
        ]
        for row in values["rows"]
    ]
    return (
        f"{env['gpu']}, driver {env['driver']}, torch {env['torch']}; revision {short_revision(env)}. "
        f"Ceilings: read {read:.2f} TB/s, copy {copied:.2f} TB/s, bf16 matrix product {flops:.0f} TFLOP/s.\n\n"
        f"{markdown_table(columns, rows)}\n\n```bash\n{env['command']}\n```"
    )


def paging_section(path: Path) -> str:
    """What the README says of a file of bench/paging.py."""
    values = json.loads(path.read_text(encoding="utf-8"))
    env, facts = values["environment"], values["facts"]
    copied, computed = (facts["block_seconds"][how] * 1e6 for how in ("copied", "computed"))
    return (
        f"{env['gpu'] or env['cpu']}, torch {env['torch']}; revision {short_revision(env)}. "
        f"{facts['num_cache_tokens']:,} tokens of cache, {facts['num_host_tokens']:,} behind it. A block takes "
        f"{copied:,.0f} us to the host and back, and {computed:,.0f} us to be computed; fewer than "
        f"{facts['min_paged_in']:,} in a row are computed.\n\n"
        f"{paging.table(values['rows'])}\n\n```bash\n{env['command']}\n```"
    )


def _one_by_one(section_of: Callable[[Path], str]) -> Callable[[list[Path]], str]:
    return lambda paths: "\n\n".join(map(section_of, paths))


SECTIONS: dict[str, Callable[[list[Path]], str]] = {
    "speed": _one_by_one(speed_section),
    "kernels": _one_by_one(kernels_section),
    "paging": _one_by_one(paging_section),
    "quality": quality_section,
}
