"""A comparison of two checkpoints as rows for a table, as files, and as a line of the README's table."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import output
from bench.environment import short_revision
from bench.quality import LayerError, Pair, Quality
from bench.report import Table, markdown_table
from engine.errors import UserError

BUSY_LOAD = 1.5  # a core: the measurement itself makes 1
SPEEDS = (
    ("decode, batch 1", "decode_1"),
    ("decode, batch 16", "decode_16"),
    ("decode, batch 64", "decode_64"),
    ("prefill", "prefill"),
)


def quality_table(quality: Quality) -> Table:
    """A line for each figure: before, after, and the change."""
    rows = [
        ["perplexity", *_shown_pair(quality.perplexity, shown), _change(quality.perplexity)],
        ["KL divergence, mean (nats)", "-", shown(quality.kl["mean"]), "-"],
        ["KL divergence, p99 (nats)", "-", shown(quality.kl["p99"]), "-"],
        ["top-1 agreement", "-", f"{quality.top1_agreement:.2%}", "-"],
        ["weights in memory (MB)", *_shown_pair(quality.bytes, megabytes), _change(quality.bytes)],
        ["weights on disk (MB)", *_shown_pair(quality.file_bytes, megabytes), _change(quality.file_bytes)],
    ]
    for label, name in SPEEDS:
        pair = quality.tokens_per_s[name]
        rows.append([f"{label} (tok/s)", *_shown_pair(pair, shown), _change(pair)])
    return ["figure", "before", "after", "change"], rows


def describe(quality: Quality) -> str:
    return f"{quality.before} → {quality.after}"


def notes(quality: Quality) -> list[str]:
    """On what it was measured, which layer lost most, and what the figures mean."""
    text = quality.text
    lines = [
        f"text: {text['name']}, {text['windows']} x {text['window_tokens']:,} tokens; "
        f"{quality.dtype} on {describe_machine(quality)}"
    ]
    if busy := busyness(quality):
        lines.append(busy)
    if worst := worst_layer(quality):
        lines.append(f"largest error of a layer: {shown(worst.error)}, layer {worst.layer}")
    return [*lines, *(f"{name}: {meaning}" for name, meaning in quality.definitions.items())]


def describe_machine(quality: Quality) -> str:
    env = quality.environment
    return env["gpu"] if quality.device.startswith("cuda") else f"{env['cpu']} ({env['cpu_count']} cores)"


def busyness(quality: Quality) -> str:
    """A warning where more was running than has cores; "" where speeds can be believed."""
    load, cores = quality.environment["load_average"], quality.environment["cpu_count"]
    if quality.device.startswith("cuda") or load <= BUSY_LOAD * cores:
        return ""
    return f"the machine was busy (load average {load:g} on {cores} cores): its speeds say little"


def worst_layer(quality: Quality) -> LayerError | None:
    alone = [layer for layer in quality.layers if layer.part == "layer alone"]
    return max(alone, key=lambda layer: layer.error, default=None)


def write(quality: Quality, folder: Path) -> None:
    """Put quality.json and the page quality.html into a folder. Raises UserError."""
    for extension in (".json", ".html"):
        write_file(quality, folder / f"quality{extension}")


def write_file(quality: Quality, path: Path) -> None:
    """Write it in the format that the file's name says. Raises UserError."""
    output.write(path, {ending: partial(content, quality) for ending, content in FORMATS.items()})


def to_json(quality: Quality) -> str:
    return json.dumps(quality.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(quality: Quality) -> str:
    """One line, so that the files of several runs can be put together."""
    import pandas as pd

    left_out = ("definitions", "layers", "kl_histogram")
    values = {name: value for name, value in quality.to_dict().items() if name not in left_out}
    return str(pd.json_normalize(values).to_csv(index=False))


def to_markdown(quality: Quality) -> str:
    """The table and what it says, for a model card."""
    lines = "\n".join(f"- {note}" for note in notes(quality))
    return f"### {describe(quality)}\n\n{markdown_table(*quality_table(quality))}\n\n{lines}\n"


def to_html(quality: Quality) -> str:
    from bench import quality_page

    return quality_page.to_html(quality)


FORMATS: dict[str, Callable[[Quality], str]] = {
    ".json": to_json,
    ".csv": to_csv,
    ".md": to_markdown,
    ".html": to_html,
}


def read(path: Path) -> Quality:
    """A quality.json. Raises UserError."""
    try:
        return Quality.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a result of `vcli bench --quality` ({error})") from None


def quality_section(paths: list[Path]) -> str:
    """What the README says of files of quality: a line for each recipe, and below it the commands."""
    columns = ["model", "recipe", "perplexity", "change", "KL mean / p99", "same top-1", "MB in memory", "quantized in"]
    columns += ["machine", "revision"]
    rows, commands = [], []
    for quality in map(read, paths):
        recipe, env = quality.recipe or {}, quality.environment
        rows.append(
            [
                quality.before,
                recipe.get("name", quality.after),
                " → ".join(_shown_pair(quality.perplexity, shown)),
                _change(quality.perplexity),
                f"{shown(quality.kl['mean'])} / {shown(quality.kl['p99'])}",
                f"{quality.top1_agreement:.1%}",
                " → ".join(_shown_pair(quality.bytes, megabytes)),
                minutes(recipe["seconds"]) if "seconds" in recipe else None,
                describe_machine(quality),
                short_revision(env),
            ]
        )
        commands.append(str(env.get("command")))
    listed = "\n".join(dict.fromkeys(commands))
    return f"{markdown_table(columns, rows)}\n\nThe commands, line by line:\n\n```bash\n{listed}\n```"


def shown(value: float | None) -> str:
    """Four digits that count: 31.41, 0.004213, 1,234."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    size = abs(float(f"{value:.4g}"))
    return f"{value:,.{max(3 - math.floor(math.log10(size)), 0)}f}"


def megabytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e6:,.1f}"


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _shown_pair(pair: Pair, show: Callable[[Any], str]) -> list[str]:
    return [show(pair["before"]), show(pair["after"])]


def _change(pair: Pair) -> str:
    """In percent of what it was."""
    before, after = pair["before"], pair["after"]
    return "-" if before is None or after is None else f"{(after / before - 1) * 100:+.2f}%"
