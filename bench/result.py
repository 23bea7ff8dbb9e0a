"""One benchmark result: its figures and everything needed to believe them.

In JSON the figures lie at the top level under the names that `vllm bench serve` gives them, the rest in blocks.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from bench.metrics import DEFINITIONS
from engine.errors import UserError

KINDS = ("serving", "throughput")  # a run, with a server or without: a row of the README's table
BLOCKS = ("workload", "baseline", "floor", "environment", "definitions", "trials", "engines")


@dataclass
class BenchResult:
    kind: str = ""  # one of KINDS, or "sweep" of several runs, "latency", "gate", "compare", "profile"
    model: str = ""
    workload: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] | None = None
    floor: dict[str, Any] | None = None
    definitions: dict[str, str] = field(default_factory=lambda: dict(DEFINITIONS))
    samples: dict[str, Any] | None = None  # what the figures were made from (bench.serving.ServingRun.samples)
    runs: list[Self] = field(default_factory=list)  # of a sweep, which has no figures of its own
    trials: list[dict[str, Any]] | None = None  # of a gate: the figures of both sides of each pair
    engines: list[dict[str, Any]] | None = None  # of a comparison: what was measured of each

    @property
    def is_valid(self) -> bool:
        return bool(self.metrics.get("valid", True)) and all(run.is_valid for run in self.runs)

    def to_dict(self, with_samples: bool = False) -> dict[str, Any]:
        names = (*BLOCKS, *(["samples"] if with_samples else []))
        blocks = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.engines is not None and not with_samples:
            blocks["engines"] = [{k: v for k, v in engine.items() if k != "samples"} for engine in self.engines]
        runs = {"runs": [run.to_dict(with_samples) for run in self.runs]} if self.runs else {}
        return {"kind": self.kind, "model": self.model, **self.metrics, **blocks, **runs}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        known = {"kind", "model", "samples", "runs", *BLOCKS}
        metrics = {name: value for name, value in values.items() if name not in known}
        result = cls(metrics=metrics, **{name: value for name, value in values.items() if name in known})
        return replace(result, runs=[cls.from_dict(run) for run in values.get("runs", [])])

    def to_json(self, with_samples: bool = False) -> str:
        return _lines(self.to_dict(with_samples)) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a result of `vcli bench` ({error})") from None


def _lines(value: Any, indent: str = "") -> str:
    """JSON with an entry on each line, and a list of figures on one."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        entries = [f"{inner}{json.dumps(name)}: {_lines(each, inner)}" for name, each in value.items()]
        return "{\n" + ",\n".join(entries) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return "[" + ", ".join(_lines(each, indent) for each in value) + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
