import random

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from engine.intake import make_requests, seed_of
from engine.messages import Ready, TokenLogprob, TokenOutput
from engine.outputs import OutputDelta, RequestState
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer

READY = Ready(100, 10, 16, 8, 300, [0], "cpu", "float32")
EOS = 256


def bytes_tokenizer() -> Tokenizer:
    """Every byte is a token with its own number as id; 256 ends a sequence."""
    byte_of_char = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=byte_of_char, merges=[]))
    backend.add_special_tokens(["</s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, eos_token="</s>")


TOKENIZER = bytes_tokenizer()


def make_state(**params) -> RequestState:
    requests = make_requests(
        "r",
        [1, 2, 3],
        SamplingParams(**({"max_tokens": 50} | params)),
        ready=READY,
        tokenizer=TOKENIZER,
        seeds=random.Random(0),
    )
    return RequestState("r", "prompt", requests, TOKENIZER)


def give(state: RequestState, text: str, index: int = 0, reason: str | None = None, **fields) -> OutputDelta:
    token_ids = TOKENIZER.encode(text) + ([EOS] if reason == "stop" else [])
    return state.take(index, TokenOutput("?", token_ids, reason, **fields), now=1.0)


def logprobs(num: int) -> list[TokenLogprob]:
    return [TokenLogprob(i, -float(i), 1, []) for i in range(num)]


def test_the_whole_is_the_sum_of_its_deltas():
    state = make_state(n=2)
    texts = ["", ""]
    for index, text in [(0, "hello "), (1, "other"), (0, "wörld")]:
        texts[index] += give(state, text, index).text
    texts[0] += give(state, "!", 0, "stop").text
    assert not state.is_finished
    texts[1] += give(state, "", 1, "length").text
    assert state.is_finished
    output = state.result()
    assert [each.text for each in output.outputs] == texts == ["hello wörld!", "other"]
    assert [each.finish_reason for each in output.outputs] == ["stop", "length"]
    assert output.outputs[0].token_ids[-1] == EOS, "a token that ended it is a token, and no text"
    assert (output.prompt, output.prompt_token_ids, output.finished) == ("prompt", [1, 2, 3], True)


def test_the_stop_token_is_text_when_asked_for():
    state = make_state(include_stop_str_in_output=True, skip_special_tokens=False)
    assert give(state, "end", reason="stop").text == "end</s>"


def test_a_stop_string_cuts_tokens_and_logprobs_of_the_same_step():
    state = make_state(stop=["STOP"], logprobs=0)
    assert give(state, "abcST", logprobs=logprobs(5)).text == "abc"
    delta = give(state, "OPxyz", logprobs=logprobs(5))
    assert (delta.text, len(delta.token_ids), len(delta.logprobs or [])) == ("", 2, 2)
    assert (delta.finish_reason, delta.stop_reason) == ("stop", "STOP")
    result = state.result().outputs[0]
    assert (result.text, len(result.token_ids), len(result.logprobs or [])) == ("abc", 7, 7)
    assert result.cumulative_logprob == -(0 + 1 + 2 + 3 + 4 + 0 + 1)


def test_text_that_was_held_back_comes_with_the_end():
    state = make_state(stop=["STOP"])
    assert give(state, "STO").text == ""
    delta = give(state, "", reason="length")
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("STO", "length", None)


def test_logprobs_are_there_only_when_asked_for():
    result = make_state().result().outputs[0]
    assert (result.logprobs, result.cumulative_logprob) == (None, None)


def test_cached_tokens_are_those_of_the_first_sequence():
    state = make_state(n=2)
    assert give(state, "a", 0, num_cached_tokens=1, scheduled_time=0.5).num_cached_tokens == 1
    assert give(state, "a", 1, num_cached_tokens=3, scheduled_time=0.7).num_cached_tokens == 1
    assert give(state, "b", 0).num_cached_tokens == 1
    assert (state.result().num_cached_tokens, state.timings.scheduled_time) == (1, 0.5)


def test_prompt_logprobs_are_asked_for_and_given_once():
    state = make_state(n=2, prompt_logprobs=1)
    assert [sequence.request.params.prompt_logprobs for sequence in state.sequences] == [1, None]
    assert give(state, "a", 0, prompt_logprobs=[None, *logprobs(2)]).prompt_logprobs == [None, *logprobs(2)]
    assert give(state, "b", 0).prompt_logprobs is None
    assert give(state, "c", 0, prompt_logprobs=logprobs(3)).prompt_logprobs is None, "computed again after a preemption"
    [again, other] = [sequence.unfinished_request() for sequence in state.sequences]
    assert (again.params.prompt_logprobs, len(again.output_token_ids)) == (None, 3)
    assert other.output_token_ids == []
    assert state.result().prompt_logprobs == [None, *logprobs(2)]


def test_without_detokenizing_there_are_tokens_only():
    state = make_state(detokenize=False)
    assert give(state, "abc", reason="length").text == ""
    assert len(state.result().outputs[0].token_ids) == 3


def test_open_seeds_are_drawn_and_given_ones_kept():
    assert make_state(seed=5).sequences[0].request.params.seed == 5
    assert make_state().sequences[0].request.params.seed == random.Random(0).getrandbits(63)
    seeds = {seed_of(seed, index) for seed in (0, 1, -1) for index in range(100)}
    assert len(seeds) == 300
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


def test_min_tokens_is_cut_with_max_tokens():
    params = make_state(max_tokens=500, min_tokens=400).sequences[0].request.params
    assert (params.max_tokens, params.min_tokens) == (97, 97)
