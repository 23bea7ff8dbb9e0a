"""Ten times the sustainable rate for a few seconds (`python -m bench.overload` does it for a minute, with a model)."""

import asyncio

from bench.overload import OUTCOMES, Plan, failures, measure

STEP_S, NUM_TOKENS, NUM_SEQS = 0.03, 15, 8


def test_an_overloaded_server_does_as_much_as_ever_and_turns_the_rest_away_at_once(start_server):
    server = start_server("--max-num-seqs", str(NUM_SEQS), FAKE_STEP_S=str(STEP_S)).wait_ready()
    plan = Plan(num_users=NUM_SEQS, duration_s=4.0, rates=(10.0,), input_len=20, output_len=NUM_TOKENS)
    alone, overloaded = asyncio.run(measure(server.url, plan))
    assert overloaded["rate"] > 5 * alone["goodput"]
    assert overloaded["refused"] > overloaded["completed"] > 0
    assert overloaded["as_alone"] == overloaded["completed"]
    assert sum(overloaded[outcome] for outcome in OUTCOMES) == overloaded["requests"]
    assert failures([alone, overloaded]) == []
    assert server.metric("vcli:num_requests_running") == 0
