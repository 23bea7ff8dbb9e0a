"""What a benchmark sends is a pure function of its options."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.config import BenchConfig
from bench.run import make_load, make_requests
from bench.workloads import (
    Answer,
    BenchRequest,
    file_requests,
    next_turn,
    random_requests,
    uniform_requests,
    warm_up_requests,
)
from engine.errors import UserError

SHAPE = {"input_len": 20, "output_len": 10, "vocab_size": 100}
ROOT = Path(__file__).resolve().parents[2]
FILE = {"output_len": 9, "seed": 0, "vocab_size": 1000}


def test_the_same_seed_gives_the_same_requests_and_another_seed_others():
    first = random_requests(8, **SHAPE, seed=3, range_ratio=0.5)

    assert random_requests(8, **SHAPE, seed=3, range_ratio=0.5) == first
    assert random_requests(8, **SHAPE, seed=4, range_ratio=0.5) != first


def test_random_prompts_have_exactly_the_length_that_was_asked_for():
    requests = random_requests(50, **SHAPE, seed=0)

    assert {len(request.prompt) for request in requests} == {20}
    assert {request.output_len for request in requests} == {10}
    assert all(0 <= token < 100 for request in requests for token in request.prompt)


def test_a_range_ratio_spreads_lengths_over_the_whole_range():
    requests = random_requests(500, **SHAPE, seed=0, range_ratio=0.5)

    assert {len(request.prompt) for request in requests} == set(range(10, 31))
    assert {request.output_len for request in requests} == set(range(5, 16))


def test_json_lines_hold_prompts_or_messages_and_their_own_output_length(tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "Hi"}]
    lines = [{"prompt": "Hello", "output_len": 5}, {"messages": messages}, {"prompt": [1, 2, 3]}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")

    requests = file_requests(file, **FILE)

    by_prompt = {str(request.messages or request.prompt): request for request in requests}
    assert by_prompt["Hello"].output_len == 5
    assert by_prompt["[1, 2, 3]"].output_len == 9
    assert by_prompt[str(messages)].output_len == 9


def test_sharegpt_takes_the_question_and_the_length_of_the_recorded_answer(tmp_path: Path):
    file = tmp_path / "sharegpt.json"
    talk = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "x" * 400}]}
    file.write_text(json.dumps([talk, {"conversations": []}]))

    (request,) = file_requests(file, **FILE)

    assert (request.prompt, request.output_len) == ("Why?", 100)


def test_lines_of_a_text_file_are_prompts_in_an_order_drawn_from_the_seed(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(20)))

    orders = [[r.prompt for r in file_requests(file, **{**FILE, "seed": seed})] for seed in (1, 1, 2)]

    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_a_short_file_is_gone_through_again(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")

    assert len(make_requests(BenchConfig(dataset=str(file), num_prompts=5), seed=0, vocab_size=10)) == 5


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{broken', "a.jsonl:2.*is not JSON"),
        ("a.jsonl", '{"question": "x"}', "a.jsonl:1.*needs"),
        ("a.jsonl", '{"prompt": "x", "output_len": 0}', "needs"),
        ("a.jsonl", '{"input_length": 0, "timestamp": 5}', "needs"),
        ("a.jsonl", '{"input_length": 3, "timestamp": -5}', "needs"),
        (
            "a.jsonl",
            '{"prompt": "x", "timestamp": 5}\n{"prompt": "y"}',
            "some lines have a timestamp and some have none",
        ),
        ("a.json", '{"prompt": "x"}', "must be a JSON list"),
        ("a.txt", "\n\n", "holds no prompt"),
    ],
)
def test_a_bad_dataset_is_named_with_its_line(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)

    with pytest.raises(UserError, match=message):
        file_requests(tmp_path / name, **FILE)


def test_a_missing_dataset_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        file_requests(tmp_path / "none.txt", **FILE)


def test_warm_up_does_the_same_work_with_other_prefixes():
    requests = random_requests(4, input_len=64, output_len=10, vocab_size=50_000, seed=0)

    warm = warm_up_requests(requests, 2, output_len=3)

    assert [len(request.prompt) for request in warm] == [64, 64]
    assert [request.output_len for request in warm] == [3, 3]
    assert all(a.prompt[:16] != b.prompt[:16] for a, b in zip(warm, requests, strict=False))


def test_the_warm_up_of_a_chat_is_a_chat_and_of_a_text_a_text():
    said = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Why is grass green?"}]

    chat, text = warm_up_requests([BenchRequest(9, messages=said), BenchRequest(9, "one two")], 2, output_len=3)

    (message,) = chat.messages
    assert (message["role"], chat.prompt, chat.output_len) == ("user", "", 3)
    assert sorted(message["content"].split()[2:]) == sorted(["Be", "brief", "Why", "is", "grass", "green?"])
    assert text.messages is None
    assert sorted(text.prompt.split()) == sorted(["Warm", "up:", "one", "two"])


def test_uniform_lengths_are_the_ones_of_published_figures():
    requests = uniform_requests(256, low=100, high=1024, seed=0, temperature=0.6)

    assert sum(len(request.prompt) for request in requests) == 142_827
    assert sum(request.output_len for request in requests) == 133_966
    assert {request.temperature for request in requests} == {0.6}


def test_the_same_seed_gives_the_same_bytes_in_any_process(tmp_path: Path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 1, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]}\n')
    script = f"""
import hashlib, msgspec, pathlib
from bench.workloads import file_requests, random_requests
lengths = dict(input_len=20, output_len=9, range_ratio=0.5, prefix_len=7, num_prefixes=2, turns=3)
drawn = random_requests(9, **lengths, vocab_size=1000, seed=5)
read = file_requests(pathlib.Path({str(trace)!r}), output_len=4, vocab_size=1000, seed=5)
print(hashlib.sha256(msgspec.json.encode([drawn, read])).hexdigest())
"""

    def digest(hash_seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, check=True).stdout

    assert digest("1") == digest("2")


def test_prefixes_are_shared_by_turns_and_come_before_the_prompt():
    plain = random_requests(6, **SHAPE, seed=0)

    requests = random_requests(6, **SHAPE, seed=0, prefix_len=8, num_prefixes=2)

    prefixes = [tuple(request.prompt[:8]) for request in requests]
    assert prefixes[0::2] == [prefixes[0]] * 3
    assert prefixes[1::2] == [prefixes[1]] * 3
    assert prefixes[0] != prefixes[1]
    assert [request.prompt[8:] for request in requests] == [request.prompt for request in plain]


def test_a_next_turn_has_all_that_was_said_before_in_front_of_it():
    first, *_ = random_requests(3, **SHAPE, seed=0, turns=3)

    second = next_turn(first, Answer("", [7] * 10))
    third = next_turn(second, Answer("", [8] * 10))

    assert [len(turn.prompt) for turn in first.turns] == [20, 20, 20]
    assert second.prompt == [*first.prompt, *[7] * 10, *first.turns[1].prompt]
    assert third.prompt == [*second.prompt, *[8] * 10, *first.turns[2].prompt]
    assert next_turn(third, Answer("", [9])) is None


def test_an_answer_whose_tokens_are_not_told_takes_as_much_room():
    first, *_ = random_requests(1, **SHAPE, seed=0, turns=2)

    assert len(next_turn(first, Answer("some words")).prompt) == 20 + 10 + 20


def test_a_chat_goes_on_with_what_the_server_said():
    chat = BenchRequest(
        4, messages=[{"role": "user", "content": "Hi"}], then=BenchRequest(5, messages=[{"role": "user"}])
    )

    second = next_turn(chat, Answer("Hello!", [1]))

    assert [message["role"] for message in second.messages] == ["user", "assistant", "user"]
    assert second.messages[1]["content"] == "Hello!"
    assert second.output_len == 5


def test_sharegpt_conversations_have_their_further_turns_as_a_chat(tmp_path: Path):
    file = tmp_path / "sharegpt.json"
    said = [("human", "Why?"), ("gpt", "x" * 400), ("human", "Really?"), ("gpt", "y" * 80), ("human", "Bye")]
    file.write_text(json.dumps([{"conversations": [{"from": who, "value": text} for who, text in said]}]))

    (chat,) = file_requests(file, **FILE, turns=5)

    assert [turn.messages[0]["content"] for turn in chat.turns] == ["Why?", "Really?"]
    assert [turn.output_len for turn in chat.turns] == [100, 20]


def test_a_trace_has_its_own_lengths_moments_and_shared_blocks(tmp_path: Path):
    file = tmp_path / "mooncake.jsonl"
    lines = [
        {"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [1, 9]},
        {"timestamp": 1000, "input_length": 1100, "output_length": 52, "hash_ids": [1, 2, 3]},
        {"timestamp": 1500, "prompt": "Hello", "output_length": 2},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))

    requests = make_requests(BenchConfig(dataset=str(file)), seed=0, vocab_size=1000)

    assert [request.arrival for request in requests] == [0.0, 0.5, 2.0]
    assert [len(request.prompt) for request in requests] == [1100, 5, 700]
    assert [request.output_len for request in requests] == [52, 2, 5]
    assert requests[0].prompt[:512] == requests[2].prompt[:512]
    assert requests[0].prompt[512:600] != requests[2].prompt[512:600]
    assert make_load(BenchConfig(), requests, seed=0).concurrency is None
    assert make_load(BenchConfig(concurrency=(3,)), requests, seed=0).concurrency == 3
    with pytest.raises(UserError, match="--num-prompts"):
        make_load(BenchConfig(duration_s=3.0), requests, seed=0)
