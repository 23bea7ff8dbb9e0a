"""`vcli` itself, but for an engine that some requests end: `serve_with_poison.py engine ADDRESS` is that engine."""

import os
import sys

import engine.link
from engine.batch import ScheduledBatch
from vcli.cli import main

POISON = 500  # a prompt that begins with this token ends the engine in the step that draws its NUM_TOKENS-th token
NUM_TOKENS = 3


def run_engine(arguments: list[str]) -> None:
    from engine import process
    from engine.step_result import StepResult
    from engine.worker import Worker

    run = Worker.run
    poisoned: dict[int, int] = {}  # row: tokens that its request has yet to draw

    def run_or_end(self: Worker, batch: ScheduledBatch) -> StepResult:
        for new in batch.new_rows:
            poisoned.pop(new.row, None)
            if new.token_ids[0] == POISON:
                poisoned[new.row] = NUM_TOKENS - (len(new.token_ids) - new.num_prompt_tokens)
        for request in batch.requests:
            if request.samples and request.row in poisoned:
                poisoned[request.row] -= 1
                if poisoned[request.row] <= 0:
                    os.abort()
        return run(self, batch)

    Worker.run = run_or_end  # type: ignore[method-assign]
    process.main(arguments[0], is_standby="standby" in arguments[1:])


if __name__ == "__main__":
    if sys.argv[1] == "engine":
        run_engine(sys.argv[2:])
    else:
        engine.link.module_command = lambda *_: [sys.executable, __file__, "engine"]
        main()
