"""`vcli quantize`: from a model to a quantized checkpoint that vLLM, SGLang, transformers and `vcli serve` load."""

import re
import time
from typing import TYPE_CHECKING, Annotated

import typer

from bench.config import QualityConfig
from engine.config import EngineConfig
from engine.quantization.recipe import Recipe
from vcli.bench import show_quality
from vcli.flags import FlagError, with_flags

if TYPE_CHECKING:
    from bench.quality import Quality
    from engine.quantize import Plan
    from vcli.console import Status


@with_flags
def quantize(
    recipe: Recipe,
    quality: QualityConfig,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Measure what it lost and gained, when it is made.")
    ] = True,
) -> None:
    """Make a quantized checkpoint of a model: a complete Hugging Face folder, and a report of what it lost.

    Takes the memory of one layer and of the calibration text's activations. Whatever ends it, the same command goes on
    where it was, and makes the same bytes. Exit code 3: the checkpoint does not pass --max-ppl-increase or --max-kl.
    """
    gates = [name for name in ("max_ppl_increase", "max_kl") if getattr(quality, name) is not None]
    if gates and not report:
        raise FlagError(f"--{gates[0].replace('_', '-')} needs the report: leave out --no-report")

    from bench.quality import held_out_windows
    from engine.quantize import Plan
    from engine.quantize import quantize as make
    from vcli.console import Status, console, format_seconds

    plan = Plan.of(recipe)
    if report:
        held_out_windows(quality, _engine(recipe))  # what is wrong with its text is said now
    console.print(f"making {plan.output}", markup=False)
    start, clock = time.monotonic(), _Clock()
    with Status() as status:

        def show(stage: str, num_done: int, num_total: int) -> None:
            left = clock.seconds_left(num_done, num_total)
            status.show(stage if left is None else f"{stage}, about {format_seconds(left)} left", num_done, num_total)

        make(plan, show)
        seconds = time.monotonic() - start
        measured = _measure(plan, quality, seconds, status) if report else None
    console.print(f"{plan.output} is there, after {format_seconds(seconds)}", markup=False)
    try:
        if measured is not None:
            show_quality(measured, quality)
    finally:
        console.print(f"vcli serve {plan.output}", markup=False)


def _measure(plan: "Plan", options: QualityConfig, seconds: float, status: "Status") -> "Quality":
    """What the checkpoint lost and gained, put into its folder: quality.json, quality.html, and the card."""
    from bench import quality_report
    from bench.quality import LayerError, measure

    layers = []
    for name, error in plan.errors().items():
        if found := re.search(r"layers\.(\d+)\.(.+)", name):
            layers.append(LayerError(int(found[1]), found[2], error))
    before, after = _engine(plan.recipe), EngineConfig(model=str(plan.output), device=plan.recipe.device)
    recipe = {"name": plan.name, "seconds": round(seconds, 1)}
    quality = measure(before, after, options, layers=layers, recipe=recipe, on_progress=status.show_share)
    quality_report.write(quality, plan.output)
    plan.write_card(plan.output, quality_report.to_markdown(quality))
    return quality


def _engine(recipe: Recipe) -> EngineConfig:
    """What runs the model that is quantized."""
    return EngineConfig(model=recipe.model, revision=recipe.revision, device=recipe.device)


class _Clock:
    """How long the parts of this run took: those of an earlier one took no time of it."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None  # parts done when it was seen first, and the time

    def seconds_left(self, num_done: int, num_total: int) -> float | None:
        """None before anything can be said, and when nothing is left."""
        now = time.monotonic()
        self._first = self._first or (num_done, now)
        before, since = self._first
        if not before < num_done < num_total:
            return None
        return (now - since) / (num_done - before) * (num_total - num_done)
