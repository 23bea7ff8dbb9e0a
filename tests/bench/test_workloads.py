"""What a benchmark sends is a pure function of its options."""

import json
from pathlib import Path

import pytest

from bench.workloads import file_requests, random_requests, uniform_requests, warm_up_requests
from engine.errors import UserError

SHAPE = {"input_len": 20, "output_len": 10, "vocab_size": 100}


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

    requests = file_requests(file, 3, output_len=9, seed=0)

    by_prompt = {str(request.messages or request.prompt): request for request in requests}
    assert by_prompt["Hello"].output_len == 5
    assert by_prompt["[1, 2, 3]"].output_len == 9
    assert by_prompt[str(messages)].output_len == 9


def test_sharegpt_takes_the_question_and_the_length_of_the_recorded_answer(tmp_path: Path):
    file = tmp_path / "sharegpt.json"
    talk = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "x" * 400}]}
    file.write_text(json.dumps([talk, {"conversations": []}]))

    (request,) = file_requests(file, 1, output_len=9, seed=0)

    assert (request.prompt, request.output_len) == ("Why?", 100)


def test_lines_of_a_text_file_are_prompts_in_an_order_drawn_from_the_seed(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(20)))

    orders = [[r.prompt for r in file_requests(file, 20, output_len=4, seed=seed)] for seed in (1, 1, 2)]

    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_a_short_file_is_gone_through_again(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")

    assert len(file_requests(file, 5, output_len=4, seed=0)) == 5


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{broken', "a.jsonl:2.*is not JSON"),
        ("a.jsonl", '{"question": "x"}', "a.jsonl:1.*needs"),
        ("a.jsonl", '{"prompt": "x", "output_len": 0}', "needs"),
        ("a.json", '{"prompt": "x"}', "must be a JSON list"),
        ("a.txt", "\n\n", "holds no prompt"),
    ],
)
def test_a_bad_dataset_is_named_with_its_line(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)

    with pytest.raises(UserError, match=message):
        file_requests(tmp_path / name, 1, output_len=4, seed=0)


def test_a_missing_dataset_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        file_requests(tmp_path / "none.txt", 1, output_len=4, seed=0)


def test_warm_up_does_the_same_work_with_other_prefixes():
    requests = random_requests(4, input_len=64, output_len=10, vocab_size=50_000, seed=0)

    warm = warm_up_requests(requests, 2, output_len=3)

    assert [len(request.prompt) for request in warm] == [64, 64]
    assert [request.output_len for request in warm] == [3, 3]
    assert all(a.prompt[:16] != b.prompt[:16] for a, b in zip(warm, requests, strict=False))


def test_uniform_lengths_are_the_ones_of_published_figures():
    requests = uniform_requests(256, low=100, high=1024, seed=0, temperature=0.6)

    assert sum(len(request.prompt) for request in requests) == 142_827
    assert sum(request.output_len for request in requests) == 133_966
    assert {request.temperature for request in requests} == {0.6}
