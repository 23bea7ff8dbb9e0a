"""The README's tables, made from the JSON files of results and put between their marker comments.

`python -m bench.report bench/results README.md` does it; running it twice changes nothing.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import paging
from bench.environment import short_revision
from bench.figures import PEER, all_figures
from bench.quality_report import quality_section
from bench.report import describe_machine, describe_workload, format_figure, markdown_table
from bench.result import KINDS, BenchResult
from engine.errors import UserError

SORTED_BY = "decode step, batch 64"  # if it was traced: the parts of the other steps keep its order
LIBRARIES = {"torch": r"elementwise|gather|indexSelect", "cuBLAS": r"nvjet|splitK|gemm"}  # by their kernels' names


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
    for model, steps in values["time"].items():
        parts += [f"Where the time of a step of {model} goes:", time_table(steps)]
    for model, timeline in values["start"].items():
        parts += [f"A second start of `vcli serve {model}`:", "\n".join(["```text", *timeline, "```"])]
    return "\n\n".join([*parts, f"```bash\n{env['command']}\n```"])


def time_table(steps: dict[str, list[dict[str, Any]]]) -> str:
    """Where the time of steps goes, by the figures that time them: a line for each part (bench/trace.py), and a sum."""
    order = [figure.name for figure in all_figures()]
    names = sorted(steps, key=order.index)
    columns, sums = ["part"], list[float | None]()
    for name in names:
        columns += [f"{name.removeprefix('decode step, ').removesuffix(' tokens')}: us", "floor"]
        floors = [share["floor_us"] for share in steps[name] if share["floor_us"] is not None]
        sums += [sum(share["us"] for share in steps[name]), sum(floors) if floors else None]
    # The largest of one step come first, then what only others have; the idle time stays at the end.
    first = sorted(names, key=lambda name: name != SORTED_BY)
    parts = list(dict.fromkeys(share["part"] for name in first for share in steps[name]))
    parts.sort(key=lambda part: part == "idle")
    rows = []
    for part in parts:
        shares = [next((share for share in steps[name] if share["part"] == part), {}) for name in names]
        kernels = dict.fromkeys(_in_short(kernel) for share in shares for kernel in share.get("kernels", []))
        rows.append([part, *(share.get(key) for share in shares for key in ("us", "floor_us")), ", ".join(kernels)])
    return markdown_table([*columns, "kernels"], [*rows, ["all", *sums, ""]])


def _in_short(kernel: str) -> str:
    """Ours by their names; libraries have so many, and such long ones, that it is enough to say whose they are."""
    return next((library for library, pattern in LIBRARIES.items() if re.search(pattern, kernel)), kernel)


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
