"""One benchmark result: its figures and everything needed to believe them.

In JSON the figures lie at the top level under the names that `vllm bench serve` gives them, the rest in blocks.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bench.metrics import DEFINITIONS
from engine.errors import UserError

KINDS = ("serving", "throughput")
BLOCKS = ("workload", "baseline", "floor", "environment", "definitions")


@dataclass
class BenchResult:
    kind: str = ""  # one of KINDS
    model: str = ""
    workload: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] | None = None
    floor: dict[str, Any] | None = None
    definitions: dict[str, str] = field(default_factory=lambda: dict(DEFINITIONS))

    @property
    def is_valid(self) -> bool:
        return bool(self.metrics.get("valid", True))

    def to_dict(self) -> dict[str, Any]:
        blocks = {name: getattr(self, name) for name in BLOCKS if getattr(self, name) is not None}
        return {"kind": self.kind, "model": self.model, **self.metrics, **blocks}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        known = {"kind", "model", *BLOCKS}
        metrics = {name: value for name, value in values.items() if name not in known}
        return cls(metrics=metrics, **{name: value for name, value in values.items() if name in known})

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not a result of `vcli bench` ({error})") from None
