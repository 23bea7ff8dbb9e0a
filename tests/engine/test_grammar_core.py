"""Grammars in the engine: whatever happens to a request, its tokens keep to its grammar and nobody else's change."""

import itertools
import json
from pathlib import Path

import jsonschema
import pytest

from engine.core import EngineCore
from engine.errors import UserError
from engine.grammar import choice_grammar, json_grammar, regex_grammar
from engine.llm import LLM
from engine.messages import AddRequest, TokenOutput
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from tests.engine.random_schemas import random_schema
from tests.engine.test_core import make_core, make_prompts, run

SCHEMAS = [random_schema(seed) for seed in range(8)]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint) -> Path:
    return tiny_checkpoint("llama")


def make_requests(first_seed: int = 0, **params) -> list[AddRequest]:
    """A request with each of the schemas, and between them others without."""
    requests = []
    for index, (schema, prompt) in enumerate(zip(SCHEMAS, make_prompts(), strict=False)):
        for grammar in (json_grammar(schema), ""):
            given = {"seed": first_seed + index, "max_tokens": 400 if grammar else 30, "grammar": grammar} | params
            requests.append(AddRequest(f"{index}{'g' if grammar else 'f'}", prompt, SamplingParams(**given)))
    return requests


def answers(core: EngineCore, requests: list[AddRequest]) -> dict[str, list[int]]:
    for request in requests:
        core.add(request)
    tokens: dict[str, list[int]] = {request.request_id: list(request.output_token_ids) for request in requests}
    for output in run(core):
        assert output.finish_reason in (None, "stop", "length"), output
        tokens[output.request_id] += output.token_ids
    assert core.stats.num_waiting == core.stats.num_running == 0
    return tokens


def check_json(folder: Path, tokens: dict[str, list[int]]) -> None:
    tokenizer = Tokenizer.load(str(folder))
    for index, schema in enumerate(SCHEMAS):
        jsonschema.validate(json.loads(tokenizer.decode(tokens[f"{index}g"])), schema)


def test_random_weights_write_valid_json_at_temperature_1(folder, monkeypatch):
    """Alone or in a batch, with chunks, preemptions and shared prefixes, one step in flight or two."""
    whole = make_core(folder, max_num_seqs=16, kv_cache_memory=8 << 20)
    expected = answers(whole, make_requests())
    check_json(folder, expected)
    block_bytes = (8 << 20) // whole.ready.num_blocks
    cramped = make_core(
        folder, max_num_batched_tokens=24, max_prefill_chunk=9, max_model_len=288, kv_cache_memory=19 * block_bytes
    )
    monkeypatch.setattr(cramped.scheduler, "_leaves_room", lambda *_: True)  # so that it preempts
    assert answers(cramped, make_requests()) == expected
    assert cramped.stats.num_preemptions > 0
    overlapped = make_core(folder, max_num_seqs=16, kv_cache_memory=8 << 20)
    overlapped.max_in_flight = 2
    assert answers(overlapped, make_requests()) == expected
    free = [request for request in make_requests() if not request.params.grammar]
    alone = answers(make_core(folder), free)
    assert alone == {request.request_id: expected[request.request_id] for request in free}


def test_a_request_goes_on_in_another_engine_as_if_nothing_had_been(folder):
    expected = answers(make_core(folder), make_requests())
    restarted = make_requests()
    for index, request in enumerate(restarted):
        request.output_token_ids = expected[request.request_id][: min(5 * index, len(expected[request.request_id]) - 1)]
    assert answers(make_core(folder), restarted) == expected


def test_the_answer_ends_exactly_with_its_grammar(folder):
    """Without the model's end of sequence, in spite of ignore_eos, and where the client named stop tokens."""
    tokenizer = Tokenizer.load(str(folder))
    core = make_core(folder)
    for max_in_flight in (1, 2):
        core.max_in_flight = max_in_flight
        for params in ({}, {"ignore_eos": True}, {"temperature": 0.0}, {"logprobs": 2}):
            grammar = regex_grammar("(ab|cd){3}")
            core.add(AddRequest("r", [5, 6], SamplingParams(grammar=grammar, max_tokens=50, **params)))
            outputs = list(run(core))
            text = tokenizer.decode([token for output in outputs for token in output.token_ids])
            assert len(text) == 6, text
            assert set(zip(text[::2], text[1::2], strict=True)) <= {("a", "b"), ("c", "d")}
            assert (outputs[-1].finish_reason, outputs[-1].ends_in_text) == ("stop", True)


def test_the_model_may_end_where_the_grammar_may(folder):
    core = make_core(folder)
    core.add(AddRequest("r", [5], SamplingParams(grammar=regex_grammar("a*"), logit_bias={2: 100}, max_tokens=9)))
    [output] = run(core)
    assert (output.token_ids, output.finish_reason, output.ends_in_text) == ([2], "stop", False)


def test_a_grammar_that_leaves_no_token_ends_its_request_alone(folder):
    core = make_core(folder)
    wrong = SamplingParams(grammar=choice_grammar(["ab"]), allowed_token_ids=[300], max_tokens=4)
    core.add(AddRequest("wrong", [5], wrong))
    core.add(AddRequest("bad", [5], SamplingParams(grammar="start: nobody", max_tokens=4)))
    core.add(AddRequest("fine", [5], SamplingParams(max_tokens=4, ignore_eos=True)))
    ends = {output.request_id: output for output in run(core) if output.finish_reason}
    assert ends["fine"].finish_reason == "length"
    assert ends["wrong"].finish_reason == ends["bad"].finish_reason == "error"
    assert "no token is left" in ends["wrong"].error
    assert "nobody" in ends["bad"].error


def test_a_token_counts_although_the_mask_of_the_next_one_fails(folder):
    """With two steps in flight, that mask is worked out before the token is taken in."""
    core = make_core(folder)
    core.max_in_flight = 2
    params = SamplingParams(grammar=regex_grammar("[a-c]x"), allowed_token_ids=[letter(folder, "a")], max_tokens=4)
    core.add(AddRequest("r", [5], params))
    outputs = list(run(core))
    assert [token for output in outputs for token in output.token_ids] == [letter(folder, "a")]
    assert (outputs[-1].finish_reason, outputs[-1].token_ids) == ("error", [])


def letter(folder: Path, character: str) -> int:
    [token_id] = Tokenizer.load(str(folder)).encode(character)
    return token_id


def test_a_request_can_be_aborted_while_its_grammar_is_compiled(folder):
    core = make_core(folder)
    core.add(AddRequest("r", [5], SamplingParams(grammar=json_grammar(SCHEMAS[0]), max_tokens=4)))
    assert core.has_work
    core.abort(["r"])
    assert not core.has_work
    assert list(run(core)) == []


def test_allowed_tokens_and_bad_words_hold(folder):
    core = make_core(folder)
    allowed, bad = [300, 301, 302], [[301], [300, 302]]
    params = SamplingParams(allowed_token_ids=allowed, bad_words_token_ids=bad, max_tokens=60, ignore_eos=True)
    core.add(AddRequest("r", [5], params))
    tokens = [token for output in run(core) for token in output.token_ids]
    assert set(tokens) == {300, 302}
    assert (300, 302) not in itertools.pairwise(tokens)


def test_logprobs_are_those_of_the_model_without_the_grammar(folder):
    core = make_core(folder)

    def first(**params) -> TokenOutput:
        core.add(AddRequest("r", [5, 6, 7], SamplingParams(max_tokens=1, temperature=0, logprobs=5, **params)))
        [output] = run(core)
        return output

    [free], [bound] = first().logprobs, first(grammar=choice_grammar(["qq"])).logprobs
    assert bound.top == free.top
    assert bound.token_id not in [token for token, _ in free.top] or bound.rank > 1


def test_llm_takes_grammars_and_words(folder):
    llm = LLM(str(folder), dtype="float32", device="cpu", kv_cache_memory=1 << 20)
    params = [SamplingParams(grammar=choice_grammar(["yes", "no"]), seed=seed) for seed in range(4)]
    assert {result.outputs[0].text for result in llm.generate(["a"] * 4, params)} == {"yes", "no"}
    two = llm.generate("a", SamplingParams(grammar=choice_grammar(["yes", "no"]), n=4, seed=1))[0]
    assert {output.text for output in two.outputs} <= {"yes", "no"}
    with pytest.raises(ValueError, match="nobody"):
        llm.generate("a", SamplingParams(grammar="start: nobody"))
    liked = llm.tokenizer.encode(" the")[0]
    greedy = {"temperature": 0, "max_tokens": 8, "logit_bias": {liked: 100}}
    [free] = llm.generate("a", SamplingParams(**greedy))[0].outputs
    [bound] = llm.generate("a", SamplingParams(**greedy, bad_words=["the"]))[0].outputs
    assert "the" in free.text
    assert "the" not in bound.text


def test_without_a_tokenizer_a_grammar_is_refused(folder):
    llm = LLM(str(folder), dtype="float32", device="cpu", kv_cache_memory=1 << 20, skip_tokenizer_init=True)
    with pytest.raises((ValueError, UserError), match="tokenizer"):
        llm.generate({"prompt_token_ids": [5]}, SamplingParams(grammar=choice_grammar(["a"])))


@pytest.mark.parametrize(
    "params",
    [
        {"grammar": "start: /a/", "min_tokens": 1},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [1], "min_tokens": 1},
        {"bad_words": [" "]},
        {"bad_words": ["a"] * 1000},
    ],
)
def test_parameters_that_do_not_go_together_are_refused(params):
    with pytest.raises(ValueError, match=next(iter(params)) if len(params) == 1 else "min_tokens"):
        SamplingParams(**params)
