"""`vcli quantize`: from a model to a quantized checkpoint that vLLM, SGLang, transformers and `vcli serve` load."""

import time

from engine.quantization.recipe import Recipe
from vcli.flags import with_flags


@with_flags
def quantize(recipe: Recipe) -> None:
    """Quantize a model: write a complete Hugging Face folder of smaller weights.

    Takes the memory of one layer and of the calibration text's activations. Ended by whatever, it goes on where it was
    when it is started again, and makes the same bytes.
    """
    from engine.quantize import quantize
    from vcli.console import Status, console, format_seconds

    start = time.monotonic()
    clock = _Clock()
    with Status() as status:

        def show(stage: str, num_done: int, num_total: int) -> None:
            left = clock.seconds_left(num_done, num_total)
            status.show(stage if left is None else f"{stage}, about {format_seconds(left)} left", num_done, num_total)

        folder = quantize(recipe, show)
    console.print(f"{folder} is there, after {format_seconds(time.monotonic() - start)}", markup=False)


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
