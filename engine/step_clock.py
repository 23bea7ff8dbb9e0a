"""Where the engine's thread spends its time: always in one stage, from its first moment on, without gaps.

Cheap enough to be always on: a step enters about ten stages, at a fraction of a microsecond each.
"""

import time

STAGES = {
    "idle": "no request is there",
    "receive": "messages with new requests come in",
    "schedule": "which requests get how many tokens",
    "prepare": "the batch becomes arrays, on their way to the device; copies of KV blocks begin",
    "forward": "the model: on a GPU its launch, on a CPU its computation",
    "sample": "tokens are drawn: on a GPU the launch of it",
    "wait": "for the device, which is what a GPU's host should do most",
    "update": "drawn tokens are taken in: ends, blocks, messages",
    "send": "messages with tokens go out",
}


class StepClock:
    """Seconds by stage, counted up to the time.monotonic() `since`.

    `spans`, once it is a list, gets every stage that ends, with its start and end.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.spans: list[tuple[str, float, float]] | None = None
        self._stage, self.since = "idle", time.monotonic()

    def enter(self, stage: str) -> None:
        """End the stage that is under way, and begin another or the same."""
        now = time.monotonic()
        self.seconds[self._stage] += now - self.since
        if self.spans is not None:
            self.spans.append((self._stage, self.since, now))
        self._stage, self.since = stage, now
