"""The sampler against sorting, counting and probabilities written out in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import ops, sampler
from engine.sampling_params import SamplingParams

VOCAB = 50


def draw(logits: torch.Tensor, positions: list[int], history: list[int] | None = None, num_prompt: int = 0, **params):
    row = sampler.make_row(SamplingParams(**params), num_prompt, [3], torch.device("cpu"))
    rows = [row] * len(positions)
    histories = [torch.tensor(history or [], dtype=torch.int32)] * len(positions)
    return sampler.sample(logits.clone(), rows, histories, positions)


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
    kept = sampler._keep_top_p(torch.tensor(logits, dtype=torch.float32)[None], torch.tensor([[top_p]]))
    assert set(torch.isfinite(kept[0]).nonzero().flatten().tolist()) == kept_by_sorting(logits, 0, top_p, 0, 1.0)


def test_a_row_draws_the_same_in_any_company():
    logits = torch.randn(4, VOCAB)
    device = torch.device("cpu")
    variants = [SamplingParams(seed=7), SamplingParams(seed=7, top_k=3), SamplingParams(temperature=0)]
    alone = draw(logits[:1], [11], temperature=0.8, top_p=0.9, seed=3)
    rows = [sampler.make_row(p, 0, [], device) for p in variants]
    rows.append(sampler.make_row(SamplingParams(temperature=0.8, top_p=0.9, seed=3), 0, [], device))
    together = sampler.sample(logits[[1, 2, 3, 0]].clone(), rows, [torch.tensor([])] * 4, [4, 9, 30, 11])
    assert together[3] == alone[0]
    assert together[2] == logits[3].argmax()


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
    row = sampler.make_row(
        SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.5),
        num_prompt,
        [],
        logits.device,
    )
    changed = logits.clone()
    sampler._change_logits(changed[0], row, torch.tensor(history, dtype=torch.int32))
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
