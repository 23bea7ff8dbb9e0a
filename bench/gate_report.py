"""A gate's result as rows for a table, and as files: for people, for CI (JUnit), for the next gate (JSON)."""

import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import output
from bench.limits import Verdict
from bench.report import Table, describe, markdown_table
from bench.result import BenchResult


def title(result: BenchResult) -> str:
    """What was held against what, in one line."""
    return f"{result.metrics['after']} against {result.metrics['before']} · {describe(result)}"


def limit_table(result: BenchResult) -> Table:
    """One row a limit."""
    rows = []
    for found in result.metrics["limits"]:
        low, high = found["interval"]
        interval = "-" if low is None and high is None else f"{_percent(low)} to {_percent(high)}"
        rows.append([found["limit"], _percent(found["measured"]), interval, found["verdict"]])
    return ["limit", "measured", "95% interval", "verdict"], rows


def conclusion(result: BenchResult) -> str:
    """The verdict with what it stands on."""
    figures = result.metrics
    starts = "two starts" if figures["num_starts"] > 1 else "one start"
    reason = f": {figures['reason']}" if figures["reason"] else ""
    left_out = (
        f"; {figures['num_invalid']} more left out, the client was too slow in them" if figures["num_invalid"] else ""
    )
    return f"{figures['verdict']}{reason} ({figures['num_pairs']} pairs of trials, {starts} of both{left_out})"


def to_markdown(result: BenchResult) -> str:
    parts = [f"### {title(result)}", markdown_table(*limit_table(result)), f"**{conclusion(result)}**"]
    parts += [f"`{result.environment.get('command')}`"]
    parts += ["\n".join(f"- {name}: {text}" for name, text in result.definitions.items())]
    return "\n\n".join(parts) + "\n"


def to_junit(result: BenchResult) -> str:
    """One test case a limit: a failure where it regressed, an error where nothing could be decided."""
    findings = result.metrics["limits"]
    verdicts = [found["verdict"] for found in findings]
    suite = ET.Element("testsuite", name="vcli bench gate", tests=str(len(findings)))
    suite.set("failures", str(verdicts.count(Verdict.REGRESSED)))
    suite.set("errors", str(verdicts.count(Verdict.UNDECIDED)))
    for found, row in zip(findings, limit_table(result)[1], strict=True):
        case = ET.SubElement(suite, "testcase", classname=result.model, name=found["limit"])
        if found["verdict"] != Verdict.FINE:
            kind = "failure" if found["verdict"] == Verdict.REGRESSED else "error"
            problem = ET.SubElement(case, kind, message=f"{found['verdict']}: {row[1]}, {row[2]}")
            problem.text = f"{title(result)}\n{conclusion(result)}"
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


FORMATS: dict[str, Callable[[BenchResult], str]] = {".json": BenchResult.to_json, ".xml": to_junit, ".md": to_markdown}


def write(result: BenchResult, path: Path) -> None:
    """Write a gate's result in the format that the file's name says. Raises UserError."""
    output.write(path, {ending: partial(content, result) for ending, content in FORMATS.items()})


def _percent(change: float | None) -> str:
    """A signed change; a bound that is not known is open."""
    return "?" if change is None else f"{change:+.1%}"
