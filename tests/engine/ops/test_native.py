"""The native CPU ops say what the reference says in float64, over shapes that a model or a batch may bring."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.batch import ForwardBatch
from engine.ops import native, reference

DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="this machine has no C compiler")


def assert_close(got: Tensor, exact: Tensor, rtol: float = 2e-6) -> None:
    """As near to the exact result as its number type allows: half a unit of bfloat16, or float32 arithmetic."""
    tolerance = 2.0**-8 if got.dtype == torch.bfloat16 else rtol
    scale = exact.abs().mean()
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=float(scale * max(rtol, 1e-6) * 4))


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def test_the_library_is_built_here():
    assert native.is_usable(torch.empty(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 576), (3, 1), (5, 33), (2, 8192), (200, 576)])
@pytest.mark.parametrize("weight_is_wide", [False, True])
def test_norms_are_exact_to_rounding(rows, dim, dtype, weight_is_wide):
    torch.manual_seed(0)
    x, residual = random(rows, dim, dtype=dtype), random(rows, dim, dtype=dtype)
    weight = random(dim, dtype=torch.float32 if weight_is_wide else dtype)
    assert_close(native.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5).double(), 1e-5)
    total = residual + x
    y = native.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert_close(y, reference.rms_norm(total.double(), weight.double(), 1e-5).double(), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1536), (3, 7), (64, 1536)])
def test_gated_activations_are_exact_to_rounding(rows, dim, kind, dtype):
    torch.manual_seed(0)
    gate_up = 4 * random(rows, 2 * dim, dtype=dtype)
    gate_up[0, 0] = -200.0
    exact = reference.gated_activation(gate_up.double(), kind)
    assert_close(native.gated_activation(gate_up, kind), exact, 1e-6)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    in_features=st.one_of(st.integers(1, 100), st.sampled_from([576, 1536])),
    out_features=st.integers(1, 200),
    has_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_linear_is_exact_to_rounding(rows, in_features, out_features, has_bias, dtype):
    torch.manual_seed(rows + in_features)
    x, weight = random(rows, in_features, dtype=dtype), random(out_features, in_features, dtype=dtype)
    bias = random(out_features, dtype=dtype) if has_bias else None
    exact = reference.linear(x.double(), weight.double(), bias.double() if bias is not None else None)
    y = native.linear(x, weight, bias)
    # The unit of a sum is that of its terms: sqrt(in) for normal numbers.
    tolerance = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=4e-6 * in_features**0.5)
    again = native.linear(x, weight, bias)
    assert torch.equal(y, again)


def test_a_row_of_a_float32_product_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    x, weight = random(40, 576, dtype=torch.float32), random(100, 576, dtype=torch.float32)
    together = native.linear(x, weight, None)
    for rows in (1, 2, 7):
        assert torch.equal(native.linear(x[:rows].contiguous(), weight, None), together[:rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 300])
def test_logits_keep_all_of_float32(rows, dtype):
    hidden, weight = random(rows, 576, dtype=dtype), random(1000, 576, dtype=dtype)
    y = native.logits(hidden, weight)
    assert y.dtype is torch.float32
    assert torch.allclose(y.double(), hidden.double() @ weight.double().t(), rtol=1e-4, atol=1e-3)


def test_linear_reads_nothing_outside_its_weight():
    torch.manual_seed(0)
    memory = torch.full((70, 37), torch.nan, dtype=torch.bfloat16)
    memory[10:60] = random(50, 37, dtype=torch.bfloat16)
    weight = memory[10:60]
    assert native.linear(random(5, 37, dtype=torch.bfloat16), weight, None).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (96, 32), (32, 32), (8, 4)])
@pytest.mark.parametrize("norm_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 50])
def test_rotation_writes_what_the_reference_writes(head_dim, rotary_dim, norm_dtype, num_tokens, dtype):
    torch.manual_seed(0)
    qkv = random(num_tokens, (9 + 2 * 3) * head_dim, dtype=dtype)
    positions = torch.randint(0, 100, (num_tokens,), dtype=torch.int32)
    slots = torch.randperm(64)[:num_tokens].int()
    angles = torch.rand(100, rotary_dim // 2) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    norms = [random(head_dim, dtype=norm_dtype).abs() if norm_dtype else None for _ in range(2)]
    wide_norms = [norm.double() if norm is not None else None for norm in norms]
    caches = [torch.zeros(4, 3, 16, head_dim, dtype=dtype) for _ in range(2)]
    wide_caches = [cache.double() for cache in caches]

    q = native.rotate_and_store(qkv, positions, slots, cos_sin, *caches, *norms, 1e-6)

    exact = reference.rotate_and_store(qkv.double(), positions, slots, cos_sin, *wide_caches, *wide_norms, 1e-6)
    for got, want in zip([q, *caches], [exact, *wide_caches], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2**-8 if dtype == torch.bfloat16 else 2e-6, atol=2e-6)


def ragged_batch(query_lens: list[int], computed: list[int], num_blocks: int) -> ForwardBatch:
    """Requests with some tokens in the cache and some to compute; their blocks are drawn from the pool in any order."""
    contexts = [query + before for query, before in zip(query_lens, computed, strict=True)]
    pool = torch.randperm(num_blocks).tolist()
    table = torch.full((len(contexts) + 2, 1 + max(contexts) // 16 + 1), -1, dtype=torch.int32)
    rows = torch.randperm(len(contexts) + 2)[: len(contexts)].int()
    for row, context in zip(rows.tolist(), contexts, strict=True):
        for i in range(-(-context // 16)):
            table[row, i] = pool.pop()
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    nothing = torch.empty(0, dtype=torch.int32)
    num_decodes = sum(length == 1 for length in query_lens)
    return ForwardBatch(
        nothing,
        nothing,
        nothing,
        starts,
        torch.tensor(contexts).int(),
        rows,
        table,
        num_decodes,
        max(query_lens),
        max(contexts),
    )


@settings(max_examples=80, deadline=None)
@given(
    decodes=st.lists(st.integers(0, 1200), max_size=6),
    chunks=st.lists(st.tuples(st.integers(1, 90), st.one_of(st.just(0), st.integers(0, 200))), max_size=3),
    heads=st.sampled_from([(9, 3), (4, 4), (8, 1), (14, 2)]),
    head_dim=st.sampled_from([32, 64, 96]),
    window=st.sampled_from([0, 0, 1, 40, 700]),
    softcap=st.sampled_from([0.0, 0.0, 20.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_attention_is_exact_to_rounding_in_mixed_batches(decodes, chunks, heads, head_dim, window, softcap, dtype):
    if not decodes and not chunks:
        return
    torch.manual_seed(len(decodes))
    num_heads, num_kv_heads = heads
    query_lens = [1] * len(decodes) + [length for length, _ in chunks]
    batch = ragged_batch(query_lens, decodes + [before for _, before in chunks], num_blocks=640)
    # What no request owns may be anything, NaN too.
    caches = [torch.full((640, num_kv_heads, 16, head_dim), torch.nan, dtype=dtype) for _ in range(2)]
    for row, context in zip(batch.rows.tolist(), batch.context_lens.tolist(), strict=True):
        blocks = batch.block_table[row, torch.arange(context) // 16].long()
        for cache in caches:
            cache[blocks, :, torch.arange(context) % 16] = random(context, num_kv_heads, head_dim, dtype=dtype)
    q = 2 * random(sum(query_lens), num_heads, head_dim, dtype=dtype)
    scale = head_dim**-0.5

    out = native.paged_attention(q, *caches, batch, scale, window, softcap)

    wide = [cache.double() for cache in caches]
    exact = reference.paged_attention(q.double(), *wide, batch, scale, window, softcap)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 0, atol=1e-5)


def test_attention_of_a_request_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    caches = [random(64, 3, 16, 64, dtype=torch.bfloat16) for _ in range(2)]
    batch = ragged_batch([1, 1, 20], [30, 600, 40], num_blocks=64)
    q = random(22, 9, 64, dtype=torch.bfloat16)
    together = native.paged_attention(q, *caches, batch, 0.125, 0, 0.0)
    for i, (first, last) in enumerate([(0, 1), (1, 2), (2, 22)]):
        alone = ForwardBatch(
            batch.token_ids,
            batch.positions,
            batch.slot_mapping,
            torch.tensor([0, last - first]).int(),
            batch.context_lens[i : i + 1],
            batch.rows[i : i + 1],
            batch.block_table,
            int(last - first == 1),
            last - first,
            1000,
        )
        assert torch.equal(native.paged_attention(q[first:last], *caches, alone, 0.125, 0, 0.0), together[first:last])


@pytest.mark.parametrize("vocab_size", [1, 257, 5000])
def test_noise_has_the_words_of_the_reference(vocab_size):
    seeds = torch.tensor([0, -1, 2**40 + 3, -(2**63)])
    positions = torch.tensor([0, 1, 5000, 2**31 - 1])
    noise = native.gumbel_noise(seeds, positions, vocab_size)
    expected = reference.gumbel_noise(seeds, positions, vocab_size)
    torch.testing.assert_close(noise, expected, rtol=3e-6, atol=1e-6)


def test_many_calling_threads_get_what_one_gets():
    torch.manual_seed(0)
    weight = random(3000, 576, dtype=torch.bfloat16)
    inputs = [random(rows, 576, dtype=torch.bfloat16) for rows in (1, 2, 4, 16, 40)]
    alone = [native.linear(x, weight, None) for x in inputs]

    def compute(i: int) -> bool:
        return torch.equal(native.linear(inputs[i % 5], weight, None), alone[i % 5])

    with ThreadPoolExecutor(max_workers=4) as pool:
        assert all(pool.map(compute, range(400)))


def test_ops_work_in_a_child_of_fork():
    code = """if True:
        import os, torch
        from engine.ops import native
        x, weight = torch.randn(2, 576), torch.randn(3000, 576)
        y = native.linear(x, weight, None)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(native.linear(x, weight, None), y) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(native.linear(x, weight, None), y)
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_float16_goes_to_the_reference():
    x, weight = torch.randn(3, 8).half(), torch.randn(8).half()
    assert torch.equal(native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize(
    ("variables", "says"),
    [({"PATH": ""}, "no C compiler found"), ({"VCLI_NATIVE": "0"}, "")],
    ids=["no compiler", "off"],
)
def test_without_a_library_the_reference_runs(variables, says, tmp_path):
    code = "import torch; from engine import ops; print(ops.linear(torch.ones(1, 4), torch.ones(2, 4)).tolist())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **variables}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[[4.0, 4.0]]"
    assert says in result.stderr
    assert bool(says) == bool(result.stderr)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("vocab_size", [1, 17, 49_152])
def test_of_equal_logits_the_first_is_the_best(rows, vocab_size):
    torch.manual_seed(0)
    logits = torch.randint(-3, 3, (rows, vocab_size)).float()
    logits[-1] = -3.0
    firsts = [row.index(max(row)) for row in logits.tolist()]
    places, ends = torch.arange(rows, dtype=torch.int32), torch.full((rows,), 2, dtype=torch.int32)
    token_ids = torch.zeros(rows, 4, dtype=torch.int32)

    assert native.take_best(logits, places, ends, token_ids).tolist() == firsts
    assert token_ids[:, 2].tolist() == firsts
