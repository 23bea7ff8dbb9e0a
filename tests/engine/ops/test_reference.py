"""The reference ops against slow and obvious computations: one number at a time, in float64."""

import math
from itertools import pairwise

import pytest
import torch

from engine.batch import ForwardBatch
from engine.ops import reference


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    torch.manual_seed(0)


def test_rms_norm_divides_each_row_by_its_root_mean_square():
    x, weight = torch.randn(3, 8), torch.randn(8)
    y = reference.rms_norm(x, weight, 1e-5)
    for row, out in zip(x.tolist(), y.tolist(), strict=True):
        rms = math.sqrt(sum(number**2 for number in row) / 8 + 1e-5)
        assert out == pytest.approx(
            [number / rms * w for number, w in zip(row, weight.tolist(), strict=True)], rel=1e-5
        )


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    x, weight = torch.randn(4, 1024).bfloat16(), torch.randn(1024)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    is_nearest = reference.rms_norm(x, weight, 1e-5) == expected.bfloat16()
    assert is_nearest.double().mean() > 0.999  # all but those halfway between two numbers


def test_add_rms_norm_keeps_the_sum_in_the_residual():
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    total = x + residual
    y = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert torch.equal(y, reference.rms_norm(total, weight, 1e-5))


def test_gated_activation_by_its_formulas():
    gate_up = torch.randn(2, 6, dtype=torch.float64)
    for row, silu, gelu in zip(
        gate_up.tolist(),
        reference.gated_activation(gate_up, "silu").tolist(),
        reference.gated_activation(gate_up, "gelu_tanh").tolist(),
        strict=True,
    ):
        for i, (gate, up) in enumerate(zip(row[:3], row[3:], strict=True)):
            assert silu[i] == pytest.approx(gate / (1 + math.exp(-gate)) * up)
            # the tanh form comes this close to the exact x · P(X < x)
            assert gelu[i] == pytest.approx(gate * 0.5 * (1 + math.erf(gate / math.sqrt(2))) * up, abs=2e-3)


@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_rotation_turns_pairs_by_their_angle_and_leaves_the_rest(rotary_dim):
    head_dim, half = 16, rotary_dim // 2
    qkv, angles = torch.randn(1, 3 * head_dim), torch.rand(5, half)
    caches = torch.zeros(2, 2, 1, 16, head_dim)
    position, slot = torch.tensor([3], dtype=torch.int32), torch.tensor([21], dtype=torch.int32)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    q = reference.rotate_and_store(qkv, position, slot, cos_sin, *caches.unbind(), None, None, 0.0)
    for before, after in [(qkv[0, :16], q[0, 0]), (qkv[0, 16:32], caches[0, 1, 0, 5])]:
        for i in range(half):
            turned = complex(before[i], before[i + half]) * complex(angles[3, i].cos(), angles[3, i].sin())
            assert (after[i].item(), after[i + half].item()) == pytest.approx((turned.real, turned.imag), abs=1e-5)
        assert torch.equal(after[rotary_dim:], before[rotary_dim:])
    assert torch.equal(caches[1, 1, 0, 5], qkv[0, 32:])
    assert caches.count_nonzero() == 2 * head_dim


def test_queries_and_keys_are_normed_before_they_are_turned():
    qkv, q_norm, k_norm = torch.randn(1, 3 * 8), torch.randn(8), torch.randn(8)
    caches, zero = torch.zeros(2, 1, 1, 16, 8), torch.zeros(1, dtype=torch.int32)
    unturned = torch.cat([torch.ones(1, 4), torch.zeros(1, 4)], dim=1)
    q = reference.rotate_and_store(qkv, zero, zero, unturned, *caches.unbind(), q_norm, k_norm, 1e-6)
    assert torch.equal(q[0], reference.rms_norm(qkv[:, :8], q_norm, 1e-6))
    assert torch.equal(caches[0, 0, :, 0], reference.rms_norm(qkv[:, 8:16], k_norm, 1e-6))
    assert torch.equal(caches[1, 0, 0, 0], qkv[0, 16:])


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (0, 2.0), (20, 2.0)])
def test_paged_attention_sees_what_each_token_may_see(window, softcap):
    """A decode (row 2, blocks 3 and 1) and a chunk of three tokens (row 0, block 4); two query heads to a KV head."""
    k_cache, v_cache = torch.randn(2, 5, 2, 16, 4, dtype=torch.float64).unbind()
    k_cache[0], v_cache[0] = torch.nan, torch.nan  # nobody's block
    table = torch.tensor([[4, 0], [0, 0], [3, 1]], dtype=torch.int32)
    starts, contexts, rows = ([0, 1, 4], [19, 8], [2, 0])
    batch = _batch(starts, contexts, rows, table)
    q = torch.randn(4, 4, 4, dtype=torch.float64)
    out = reference.paged_attention(q, k_cache, v_cache, batch, 0.5, window, softcap)
    for token, (request, position) in enumerate([(0, 18), (1, 5), (1, 6), (1, 7)]):
        keys = range(max(0, position + 1 - window) if window else 0, position + 1)
        places = [(int(table[rows[request], key // 16]), key % 16) for key in keys]
        for head in range(4):
            scores = [float(q[token, head] @ k_cache[block, head // 2, offset]) * 0.5 for block, offset in places]
            scores = [softcap * math.tanh(score / softcap) if softcap else score for score in scores]
            weights = torch.tensor(scores, dtype=torch.float64).exp()
            values = torch.stack([v_cache[block, head // 2, offset] for block, offset in places])
            assert torch.allclose(out[token, head], weights / weights.sum() @ values, atol=1e-6)


def test_philox_gives_the_words_of_its_published_test_vectors():
    """Random123's known answers for philox4x32-10, through the noise that is made of them."""
    noise = reference.gumbel_noise(torch.tensor([0]), torch.tensor([0]), 4)
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    expected = [-math.log(-math.log(((word >> 9) + 0.5) / 2**23)) for word in words]
    assert noise[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_noise_depends_on_seed_position_and_token_alone():
    seeds, positions = torch.tensor([7, -3, 7, 7]), torch.tensor([5, 5, 6, 5])
    noise = reference.gumbel_noise(seeds, positions, 101)
    assert torch.equal(noise[0], noise[3])
    assert torch.equal(noise[:, :50], reference.gumbel_noise(seeds, positions, 50))
    assert not torch.isclose(noise[0], noise[1]).any()
    assert not torch.isclose(noise[0], noise[2]).any()


def test_noise_follows_the_gumbel_distribution():
    noise = reference.gumbel_noise(torch.arange(16), torch.arange(16), 1 << 16).double().flatten()
    assert torch.isfinite(noise).all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.005)  # Euler's constant
    assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.01)
    for quantile in (0.01, 0.5, 0.999):
        assert (noise < -math.log(-math.log(quantile))).double().mean() == pytest.approx(quantile, abs=0.003)


def test_argmax_with_noise_draws_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    seeds = torch.arange(40_000)
    drawn = (logits + reference.gumbel_noise(seeds, torch.full_like(seeds, 9), 5)).argmax(-1)
    shares = drawn.bincount(minlength=5) / len(seeds)
    assert torch.allclose(shares, logits.softmax(-1), atol=0.01)


def _batch(starts: list[int], contexts: list[int], rows: list[int], table: torch.Tensor) -> ForwardBatch:
    query_lens = [after - before for before, after in pairwise(starts)]
    unused = torch.zeros(starts[-1], dtype=torch.int32)
    return ForwardBatch(
        token_ids=unused,
        positions=unused,
        slot_mapping=unused,
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        rows=torch.tensor(rows, dtype=torch.int32),
        block_table=table,
        num_decodes=query_lens.count(1),
        max_query_len=max(query_lens),
        max_context_len=max(contexts),
    )
