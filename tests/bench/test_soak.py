"""What a soak would notice: its judgement, on answers made by hand. (tests/vcli/test_hostile_requests.py runs one.)"""

import json
from collections import Counter

import msgspec
import psutil
import pytest

from bench.hostile import Visit, Visitors
from bench.soak import Answer, Plan, Soak, _Run, log_errors

SOUND = Visit("sound", b"", is_sound=True, body=b"sound")


def whole(status: int, body: dict) -> Answer:
    answer = Answer(b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n\r\n" % status + msgspec.json.encode(body))
    answer.read()
    return answer


def streamed(*events: str) -> Answer:
    parts = "".join(f"{len(event):x}\r\n{event}\r\n" for event in (f"data: {each}\n\n" for each in events))
    answer = Answer(f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{parts}0\r\n\r\n".encode())
    answer.read()
    return answer


def choice(text: str, index: int = 0, reason: str | None = None) -> dict:
    return {"choices": [{"index": index, "text": text, "finish_reason": reason}]}


ERROR = {"error": {"message": "no", "code": "bad"}}
NAN = {"error": {"message": "no", "code": "invalid_logits"}}
RIGHT = whole(200, choice("a b", reason="stop"))


@pytest.mark.parametrize(
    ("visit", "answer", "is_right"),
    [
        (SOUND, RIGHT, True),
        (SOUND, streamed(json.dumps(choice("a")), json.dumps(choice(" b", reason="stop")), "[DONE]"), True),
        (SOUND, streamed(json.dumps(choice("a")), json.dumps(choice(" c", reason="stop")), "[DONE]"), False),
        (SOUND, streamed(json.dumps(choice("a b", reason="stop"))), False),
        (SOUND, whole(200, choice("a b", reason="length")), False),
        (SOUND, whole(429, ERROR), False),
        (SOUND, Answer(has_left=True), False),
        (SOUND, Answer(), False),
        (Visit("changed bytes", b""), whole(400, ERROR), True),
        (Visit("changed bytes", b""), whole(400, {"detail": "no"}), False),
        (Visit("changed bytes", b""), whole(500, ERROR), False),
        (Visit("changed bytes", b""), whole(503, ERROR), False),
        (Visit("strange values", b"x-request-deadline-ms: 1\r\n"), whole(503, ERROR), True),
        (Visit("changed bytes", b""), whole(200, choice("whatever")), True),
        (Visit("changed bytes", b""), streamed(json.dumps(choice("a")), json.dumps(ERROR)), False),
        (Visit("changed bytes", b""), Answer(), False),
        (Visit("no HTTP", b"", may_be_no_http=True), Answer(), True),
        (Visit("NaN logits", b"", must_fail=True), RIGHT, False),
        (Visit("NaN logits", b"", must_fail=True), whole(500, NAN), True),
        (Visit("changed bytes", b""), whole(500, NAN), True),
        (SOUND, whole(500, NAN), False),
    ],
)
def test_an_answer_is_right_or_not(visit, answer, is_right):
    run = _Run("http://localhost:1", psutil.Process(), Plan(spoilt_token=9))
    run.expected[SOUND.body] = RIGHT.texts()
    assert (run._wrong(visit, answer) is None) == is_right


def test_memory_that_grows_and_blocks_that_stay_are_no_sound_end():
    assert Soak(rss_bytes={"engine": [100, 104]}, gauges={"num_requests_running": 0}).is_sound
    assert not Soak(rss_bytes={"engine": [100, 106]}).is_sound
    assert not Soak(gauges={"kv_cache_usage_perc": 0.1}).is_sound
    assert not Soak(log_errors=["ERROR"]).is_sound


def test_the_log_is_searched_for_errors_alone():
    harmless = "ready in 2 s\n2026 WARNING uvicorn: Invalid HTTP request\n"
    log = "2026 ERROR vcli: halfway\nTraceback (most recent call last):\nValueError: no\n"
    assert log_errors(harmless + log) == [
        "2026 ERROR vcli: halfway",
        "Traceback (most recent call last):",
        "ValueError: no",
    ]


def test_visits_can_be_made_again_and_are_of_all_kinds():
    first, again = (Visitors(seed=3, spoilt_token=9) for _ in range(2))
    visits = [first.visit(number) for number in range(1000)]
    assert visits == [again.visit(number) for number in range(1000)]
    assert visits != [Visitors(seed=4, spoilt_token=9).visit(number) for number in range(1000)]
    kinds = Counter(visit.kind for visit in visits)
    assert len(kinds) == 9
    assert kinds["NaN logits"] > 0
    assert kinds["sound"] > 300
