"""transformers in a process of its own."""

from dataclasses import replace

import pytest

from bench.baseline import BaselineModel, BaselineTask, running_baseline
from engine.errors import UserError


def test_a_model_is_loaded_once_and_runs_every_task(tiny_checkpoint):
    model = BaselineModel(str(tiny_checkpoint("llama")), "auto", "cpu", "float32")
    task = BaselineTask(prompts=[[5, 6, 7], [8, 9], [10]], output_lens=[4, 2, 3], batch_size=2)

    with running_baseline(model) as run:
        together, alone = run(task), run(replace(task, batch_size=1))

    assert (together["batch_size"], alone["batch_size"]) == (2, 1)
    assert (together["device"], together["dtype"]) == ("cpu", "float32")
    assert together["output_throughput"] * together["duration"] == pytest.approx(9)
    assert together["total_token_throughput"] * together["duration"] == pytest.approx(9 + 6)


def test_a_process_that_fails_is_told_with_its_last_words(tiny_checkpoint):
    with (
        pytest.raises(UserError, match=r"(?s)ended with exit code 1:.*nonsense"),
        running_baseline(BaselineModel(str(tiny_checkpoint("llama")), "auto", "cpu", "nonsense")),
    ):
        pass
