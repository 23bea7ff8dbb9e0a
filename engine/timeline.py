"""How a start spends its time: in each process one stage after another, from its first moment on, without gaps."""

import os
import sys
import time
from itertools import pairwise
from pathlib import Path


class Timeline:
    """The stages of each process that takes part in a start."""

    def __init__(self) -> None:
        self.stages: dict[str, list[tuple[str, float]]] = {}  # process → stages and the time.time() each began at

    def begin(self, process: str, stage: str, at: float | None = None) -> None:
        """A stage begins now, or at another time.time(), and ends the one before it; told again, it goes on."""
        stages = self.stages.setdefault(process, [])
        if not stages or stages[-1][0] != stage:
            stages.append((stage, time.time() if at is None else at))

    def rows(self, end: float) -> list[tuple[str, str, str, str]]:
        """One row a stage: process, stage, the second it began at, and how many it took; sums per process.

        What a process took adds up to the whole, from the first process's first moment to `end`.
        """
        origin = min(stages[0][1] for stages in self.stages.values())
        rows = []
        for process, stages in self.stages.items():
            before = [("not started yet", origin)] if stages[0][1] > origin else []
            # Moments are rounded, not spans: so what is printed adds up, too.
            marks = [(stage, round(at - origin, 2)) for stage, at in [*before, *stages, ("", end)]]
            spans = [(stage, start, stop - start) for (stage, start), (_, stop) in pairwise(marks)]
            spans.append(("all", 0.0, marks[-1][1]))
            rows += [(process, stage, f"{start:.2f}", f"{took:.2f}") for stage, start, took in spans]
        return rows


def process_start_time() -> float:
    """When this process began, as time.time() counts. psutil's answer is up to a second off on Linux."""
    if sys.platform != "linux":
        import psutil

        return psutil.Process().create_time()
    after_name = Path("/proc/self/stat").read_text().rsplit(")", 1)[1]
    ticks_after_boot = int(after_name.split()[19])  # field 22 of proc(5), counted from the one after the name
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks_after_boot / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s
