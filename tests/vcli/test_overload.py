"""Ten times the sustainable rate for a few seconds (`python -m bench.overload` does it for a minute, with a model)."""

import asyncio

from bench.overload import OUTCOMES, Plan, failures, measure

NUM_SEQS = 16
PACE = {"FAKE_STEP_S": "0.005", "FAKE_SEQUENCE_S": "0.004"}  # whoever runs beside others is slower


def test_an_overloaded_server_does_as_much_as_ever_and_turns_the_rest_away_at_once(start_server):
    """Deadlines are shorter than an answer takes in a full batch: who lets them all in is in time for none."""
    server = start_server("--max-num-seqs", str(NUM_SEQS), **PACE).wait_ready()
    plan = Plan(NUM_SEQS, duration_s=4.5, rates=(10.0,), deadline_factor=0.75, input_len=20, output_len=20)
    alone, overloaded = asyncio.run(measure(server.url, plan))
    assert overloaded["rate"] > 5 * alone["goodput"]
    assert overloaded["refused"] > overloaded["completed"] > 0
    assert overloaded["as_alone"] == overloaded["completed"]
    assert sum(overloaded[outcome] for outcome in OUTCOMES) == overloaded["requests"]
    assert failures([alone, overloaded]) == []
    assert server.metric("vcli:num_requests_running") == 0
