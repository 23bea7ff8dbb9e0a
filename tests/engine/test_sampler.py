"""The sampler against sorting, counting and probabilities written out in float64."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine import ops, sampler
from engine.ops import reference, sampling_line
from engine.sampling_params import MAX_LOGIT_BIAS, SamplingParams

VOCAB = 50


def pack(num_prompt: int = 0, stop_ids: tuple[int, ...] = (3,), **params) -> np.ndarray:
    return sampling_line.pack(SamplingParams(**params), num_prompt, list(stop_ids))


def draw(logits: torch.Tensor, positions: list[int], history: list[int] | None = None, num_prompt: int = 0, **params):
    """The tokens that one request draws at several positions, after the same history."""
    line = torch.from_numpy(pack(num_prompt, **params)).unsqueeze(0)
    token_ids = torch.tensor([history or []], dtype=torch.int32)
    rows, ends = torch.zeros(len(positions), dtype=torch.int32), torch.tensor(positions, dtype=torch.int32)
    return ops.sample(logits.clone(), line, rows, ends, token_ids)


def frequencies(logits: np.ndarray, num_draws: int = 10_000, **params) -> np.ndarray:
    """How often each token is drawn at as many positions."""
    many = torch.tensor(logits, dtype=torch.float32).expand(num_draws, -1)
    drawn = draw(many, list(range(num_draws)), **({"temperature": 1.0, "seed": 5} | params))
    return np.bincount(drawn.numpy(), minlength=len(logits)) / num_draws


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def kept_by_sorting(logits: np.ndarray, top_k: int, top_p: float, min_p: float, temperature: float) -> set[int]:
    scaled = logits.astype(np.float64) / temperature
    keep = set(np.flatnonzero(softmax(scaled) >= min_p * softmax(scaled).max() * (1 - 1e-5)))
    order = [i for i in np.argsort(-scaled, kind="stable") if i in keep]
    order = order[:top_k] if top_k > 0 else order
    mass, nucleus = 0.0, set()
    total = softmax(scaled)[order].sum()
    for i in order:
        if top_p < 1 and mass >= top_p * total * (1 + 1e-6):
            break
        nucleus.add(int(i))
        mass += softmax(scaled)[i]
    return nucleus


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 8, "top_p": 0.8, "temperature": 1.7},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.1},
    ],
)
def test_draws_follow_the_distribution_that_the_parameters_describe(params: dict):
    logits = np.random.default_rng(1).normal(size=VOCAB) * 2
    temperature = params.get("temperature", 1.0)
    kept = kept_by_sorting(
        logits, params.get("top_k", 0), params.get("top_p", 1.0), params.get("min_p", 0), temperature
    )
    expected = np.zeros(VOCAB)
    expected[sorted(kept)] = softmax(logits[sorted(kept)] / temperature)
    found = frequencies(logits, **params)
    assert set(np.flatnonzero(found)) <= kept
    assert np.abs(found - expected).max() < 0.02


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 0.99))
def test_top_p_keeps_what_sorting_keeps(seed: int, top_p: float):
    logits = np.random.default_rng(seed).normal(size=VOCAB) * 3
    mass = np.cumsum(np.sort(softmax(logits))[::-1])
    assume(np.abs(mass - top_p).min() > 3e-6)  # nearer than that, float32 decides
    line = sampling_line.unpack(pack(top_p=top_p))
    kept = reference.keep_best(torch.tensor(logits, dtype=torch.float32)[None], [line])
    assert set(torch.isfinite(kept[0]).nonzero().flatten().tolist()) == kept_by_sorting(logits, 0, top_p, 0, 1.0)


def test_equally_good_tokens_are_kept_together():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    for params, expected in (({"top_k": 2}, [0, 2, 3, 4]), ({"top_p": 0.5}, [0, 2, 3, 4]), ({"top_p": 0.4}, [0])):
        kept = reference.keep_best(logits, [sampling_line.unpack(pack(**params))])
        assert torch.isfinite(kept[0]).nonzero().flatten().tolist() == expected


def test_a_row_draws_the_same_in_any_company_and_the_token_goes_into_its_row():
    logits = torch.randn(4, VOCAB)
    alone = draw(logits[:1], [11], temperature=0.8, top_p=0.9, seed=3)
    lines = [pack(seed=7), pack(temperature=0), pack(seed=7, top_k=3), pack(temperature=0.8, top_p=0.9, seed=3)]
    table = torch.zeros(6, sampling_line.NUM_WORDS, dtype=torch.int32)
    for row, line in zip((5, 0, 2, 3), lines, strict=True):
        table[row, : len(line)] = torch.from_numpy(line)
    rows, ends = torch.tensor([5, 2, 0, 3], dtype=torch.int32), torch.tensor([4, 9, 30, 11], dtype=torch.int32)
    token_ids = torch.full((6, 30), -1, dtype=torch.int32)
    together = ops.sample(logits[[1, 2, 3, 0]].clone(), table, rows, ends, token_ids)
    assert together[3] == alone[0]
    assert together[2] == logits[3].argmax()
    assert token_ids[5, 4] == together[0]
    assert token_ids[2, 9] == together[1]
    assert token_ids[3, 11] == together[3]
    assert (token_ids >= 0).sum() == 3  # row 0 has no place for a 31st token


@pytest.mark.parametrize("bodies", [ops, reference])
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_p": 0.9, "top_k": 9}, {"repetition_penalty": 1.3}])
def test_a_row_with_nan_or_infinity_has_no_token_and_its_neighbours_have_theirs(bodies, params):
    logits = torch.randn(6, VOCAB)
    spoilt = logits.clone()
    spoilt[1, 7], spoilt[3, 0], spoilt[4], spoilt[5] = torch.nan, torch.inf, torch.nan, -torch.inf
    table = torch.zeros(6, sampling_line.NUM_WORDS, dtype=torch.int32)
    for row in table:
        line = pack(seed=5, **params)
        row[: len(line)] = torch.from_numpy(line)
    rows, ends = torch.arange(6, dtype=torch.int32), torch.full((6,), 2, dtype=torch.int32)
    expected = bodies.sample(logits.clone(), table, rows, ends, torch.zeros(6, 4, dtype=torch.int32))
    token_ids = torch.full((6, 4), 1, dtype=torch.int32)
    drawn = bodies.sample(spoilt.clone(), table, rows, ends, token_ids)
    assert drawn.tolist() == [expected[0], -1, expected[2], -1, -1, -1]
    assert token_ids[:, 2].tolist() == [expected[0], 0, expected[2], 0, 0, 0], "the next step runs already"
    best = bodies.take_best(spoilt, rows, ends, token_ids)
    assert best.tolist() == [logits[0].argmax(), -1, logits[2].argmax(), -1, -1, -1]
    assert torch.isfinite(bodies.logprobs(spoilt, best, 3)[0][[0, 2]]).all()


def test_lines_say_what_they_were_told():
    params = SamplingParams(
        temperature=0.5, top_k=7, top_p=0.25, min_p=0.5, seed=-5, min_tokens=2, logit_bias={4: 1.5, 9: -3.0}
    )
    line = sampling_line.unpack(sampling_line.pack(params, 6, [1, 2]))
    assert (line.header["inverse_temperature"], line.header["top_k"], line.header["top_p"]) == (2.0, 7, 0.25)
    assert line.header["max_steps"] == int(np.log(2) * 2**24)
    assert (line.header["seed"], line.header["num_prompt_tokens"]) == (-5, 6)
    assert line.forbidden.tolist() == [1, 2]
    assert (line.biased.tolist(), line.biases.tolist()) == ([4, 9], [1.5, -3.0])
    huge = sampling_line.pack(SamplingParams(top_k=2**62, seed=2**63 - 1, min_p=1e-320), 0, [])
    assert sampling_line.unpack(huge).header["top_k"] == 2**31 - 1
    fullest = SamplingParams(min_tokens=1, logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0))
    stop_ids = list(range(sampling_line.MAX_FORBIDDEN))
    assert len(sampling_line.pack(fullest, 0, stop_ids)) == sampling_line.NUM_WORDS


def test_noise_depends_on_seed_and_position_and_nothing_else():
    first = ops.gumbel_noise(torch.tensor([1, 2]), torch.tensor([5, 6]), VOCAB)
    again = ops.gumbel_noise(torch.tensor([2]), torch.tensor([6]), VOCAB)
    assert torch.equal(first[1:], again)
    assert not torch.equal(first[:1], ops.gumbel_noise(torch.tensor([1]), torch.tensor([6]), VOCAB))
    assert not torch.equal(first[:1], ops.gumbel_noise(torch.tensor([-1]), torch.tensor([5]), VOCAB))


def test_noise_is_philox():
    """The published test vector of Philox 4x32-10 for counter 0 and key 0 (Random123's kat_vectors)."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    expected = [-np.log(-np.log(((word >> 8) + 0.5) * 2.0**-24)) for word in words]
    noise = ops.gumbel_noise(torch.tensor([0]), torch.tensor([0]), 4)
    assert np.allclose(noise[0].numpy(), expected, rtol=1e-5)


def test_penalties_follow_their_formulas():
    logits = torch.randn(1, VOCAB)
    history, num_prompt = [1, 2, 2, 4, 4, 4, 9], 3  # output: 4 4 4 9
    line = pack(num_prompt, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.5)
    changed = logits.clone()
    reference.change_logits(changed[0], sampling_line.unpack(line), torch.tensor(history, dtype=torch.int32))
    expected = logits[0].double().numpy().copy()
    for token in set(history):
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token, count in {4: 3, 9: 1}.items():
        expected[token] -= 0.25 * count + 0.5
    assert np.allclose(changed[0].numpy(), expected, atol=1e-5)


def test_logit_bias_and_min_tokens_decide_greedy_draws():
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = 5.0
    assert draw(logits, [2], [1, 1], num_prompt=1, temperature=0).item() == 3
    assert draw(logits, [2], [1, 1], num_prompt=1, temperature=0, logit_bias={8: 6.0}).item() == 8
    assert draw(logits, [2], [1, 1], num_prompt=1, temperature=0, min_tokens=3).item() != 3
    assert draw(logits, [4], [1, 1, 1, 1], num_prompt=1, temperature=0, min_tokens=3).item() == 3


def test_logprobs_are_of_the_raw_logits_with_rank_and_best():
    logits = torch.randn(3, VOCAB)
    tokens = torch.tensor([4, 7, int(logits[2].argmax())])
    result = sampler.logprobs_of(logits, tokens, 5)
    reference = np.log(np.stack([softmax(row) for row in logits.double().numpy()]))
    for i, token in enumerate(tokens.tolist()):
        assert result.chosen[i].item() == pytest.approx(reference[i, token], abs=1e-5)
        assert result.rank[i].item() == 1 + (reference[i] > reference[i, token] + 1e-9).sum()
        assert result.top_ids[i].tolist() == np.argsort(-reference[i])[:5].tolist()
    assert result.rank[2] == 1
