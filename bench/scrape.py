"""What a server says at /metrics, in Prometheus' text format: its own metrics, by their names without a prefix.

Read with two patterns: Prometheus' parser takes 7 ms for a page, and a run reads one four times a second.
"""

import re
from collections.abc import Iterator

# What vLLM's and ours have in common is called the same after the prefix.
_SAMPLE = re.compile(r'^(?:vcli|vllm):(\w+)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})? (\S+)', re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def totals(text: str) -> dict[str, float]:
    """Values by name; over the labels they are summed up."""
    return _summed((name, value) for name, _, value in _SAMPLE.findall(text))


def by_label(text: str, metric: str, label: str) -> dict[str, float]:
    """The values of one metric, by those of one of its labels."""
    found = ((dict(_LABEL.findall(labels)), value) for name, labels, value in _SAMPLE.findall(text) if name == metric)
    return _summed((labels[label], value) for labels, value in found if label in labels)


def _summed(samples: Iterator[tuple[str, str]]) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, value in samples:
        values[name] = values.get(name, 0.0) + float(value)
    return values
