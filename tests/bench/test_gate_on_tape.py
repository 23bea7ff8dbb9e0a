"""The gate, played hundreds of times on recorded noise of a machine: how often is it wrong?"""

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from bench.engines import Engine, RecordingEndedError, Trial
from bench.gate import Gate
from bench.limits import Verdict, read_limits
from bench.load import Load

# Trials of two equal servers in turn, on two cores shared with compilers and tests; in "loaded" with a low priority, so
# that one trial can be three times as fast as the next.
NOISE = json.loads((Path(__file__).parents[1] / "data" / "gate-noise.json").read_text())
LIMITS = read_limits(["throughput>=-5%", "p50_itl<=+5%"])


def gate_on_tape(tape: list[dict[str, float]], slowdown: float, seed: int) -> Gate:
    """A gate whose trials are those of a recording, one after the other, this code's being slower by `slowdown`."""
    slots = iter(tape)

    def play(factor: float) -> Engine:
        def run_trial(requests: Any, load: Any) -> Trial:
            if (slot := next(slots, None)) is None:
                raise RecordingEndedError("the tape is at its end")
            return Trial(
                {name: value / factor if "throughput" in name else value * factor for name, value in slot.items()}
            )

        return Engine("tape", lambda show: contextlib.nullcontext(run_trial))

    gate = Gate(play(1.0), play(1 + slowdown), LIMITS, budget_s=1000, coin=random.Random(seed))
    gate.run(lambda index: [], Load(concurrency=1))
    return gate


def verdicts(series: str, slowdown: float, num_gates: int) -> list[Verdict]:
    """Gates that each begin somewhere in the recording, which goes round."""
    slots, rng = [dict(zip(NOISE["figures"], row, strict=True)) for row in NOISE[series]], random.Random(1)
    begins = [rng.randrange(len(slots)) for _ in range(num_gates)]
    return [gate_on_tape((slots[b:] + slots[:b]) * 5, slowdown, seed).verdict for seed, b in enumerate(begins)]


@pytest.mark.parametrize("series", ["busy", "loaded"])
def test_unchanged_code_is_not_called_regressed(series: str):
    assert verdicts(series, 0.0, 200).count(Verdict.REGRESSED) <= 1  # less than 1 %


def test_unchanged_code_passes():
    assert verdicts("busy", 0.0, 100).count(Verdict.FINE) >= 95


def test_a_slowdown_of_10_percent_is_caught():
    assert verdicts("busy", 0.1, 100).count(Verdict.REGRESSED) >= 95


def test_a_slowdown_is_never_called_fine_however_loaded_the_machine_is():
    assert verdicts("loaded", 0.1, 100).count(Verdict.FINE) <= 5
