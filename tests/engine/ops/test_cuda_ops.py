"""The CUDA bodies of the ops on a GPU, against float64: types, head sizes, ragged batches, windows, long contexts."""

import random
from functools import partial

import pytest
import torch

from engine.ops import cuda, reference
from engine.ops.cuda import gemm, grouped_gemm, rounded_gemm
from tests.engine.ops import cuda_cases as cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ON_HOPPER = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="the kernel is for Hopper"
)
BF16, F16, F32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
HEADS = [(9, 3), (32, 8), (28, 4), (8, 8), (16, 1), (40, 8)]


@pytest.fixture(params=["chosen", "newest"])
def kernels(request, monkeypatch):
    """The attention kernels that are chosen by default, and the newest for all that they can do."""
    if request.param == "newest":
        monkeypatch.setattr(cuda.attention, "attention_files", cases.newest_attention_files)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("dim", [64, 576, 2048, 4096, 5120, 8192, 16384])
def test_norms(dtype, dim):
    for rows in (1, 7, 1000, 5000):
        cases.check_norms("cuda", dtype, dtype, rows, dim)
        cases.check_norms("cuda", dtype, F32, rows, dim)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dim", [64, 1536, 14336, 28672])
def test_gated_activation(dtype, kind, dim):
    for rows in (1, 7, 1000):
        cases.check_gated_activation("cuda", dtype, kind, rows, dim)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize(
    ("inputs", "out"),
    [
        *[(4096, 6144), (14336, 4096), (1024, 151_936), (1024, 4096), (2048, 1024), (3072, 1024)],
        *[(576, 960), (40, 8), (8, 24), (896, 4864), (104, 3)],
    ],
)
def test_linear(dtype, inputs, out):
    for rows in (1, 2, 7, 8, 9, 16, 17, 32, 64, 100, 128, 300):
        cases.check_linear("cuda", dtype, rows, inputs, out, has_bias=rows % 2 == 0)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("inputs", "dim"), [(4096, 14_336), (1024, 3072), (576, 1536), (64, 8), (40, 24)])
def test_gated_linear(dtype, kind, inputs, dim):
    for rows in (1, 8, 16, 17, 64, 100, 128, 200, 1024):
        cases.check_gated_linear("cuda", dtype, kind, rows, inputs, dim, has_bias=rows % 2 == 0)


@ON_HOPPER
def test_random_tilings():
    draw = random.Random()
    for _ in range(150):
        groups, parts, rows = draw.choice([1, 2]), draw.choice([1, 2]), draw.choice(gemm.MANY_ROWS)
        cluster, split = draw.choice([(1, 1), (2, 1), (1, 2), (1, 8)])
        tiling = gemm.Tiling(rows, groups, parts, draw.randrange(16, 64 * groups + 1, 8 * cluster), cluster, split)
        form = draw.choice(gemm.FORMS if parts == 2 else gemm.FORMS[:2])
        shape = draw.randint(1, 4 * rows), 8 * draw.randint(1, 700), 16 * draw.randint(1, 600)
        case = (draw.choice([BF16, F16]), tiling, form, *shape, draw.random() < 0.5)
        print(case)  # shown if it fails
        cases.check_many_rows("cuda", *case)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("stored", [E4M3, torch.int8])
@pytest.mark.parametrize("dim", [64, 576, 4096, 14_336, 32_768])
def test_rows_are_rounded_to_eight_bits(dtype, stored, dim):
    for rows in (1, 7, 1000):
        cases.check_rounding("cuda", dtype, stored, rows, dim)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("stored", [E4M3, torch.int8])
@pytest.mark.parametrize(
    ("inputs", "out", "form"),
    [
        (4096, 6144, "plain"),
        (14_336, 4096, "plain"),
        (4096, 28_672, "silu"),
        (576, 960, "gelu_tanh"),
        (1040, 72, "plain"),
    ],
)
def test_products_of_eight_bits(dtype, stored, inputs, out, form):
    for rows in (1, 2, 8, 9, 16, 17, 33, 64, 100, 128, 200, 256, 600):
        if dtype is F16 and stored is E4M3 and not rounded_gemm.many_rows_pays(rows, out, form, 132):
            continue  # PyTorch's product, which gives bfloat16
        cases.check_rounded_linear("cuda", rounded_gemm.product, stored, dtype, form, rows, inputs, out, rows % 2 == 0)


@ON_HOPPER
def test_random_tilings_of_eight_bits():
    draw = random.Random()
    for _ in range(200):
        groups, parts, rows = draw.choice([1, 2]), draw.choice([1, 2]), draw.choice(gemm.MANY_ROWS)
        cluster, split = draw.choice([(1, 1), (2, 1), (1, 2), (1, 4)])
        tiling = gemm.Tiling(rows, groups, parts, draw.randrange(16, 64 * groups + 1, 8 * cluster), cluster, split)
        form = draw.choice([form for form in gemm.FORMS if form != "float" and (parts == 2 or form == "plain")])
        shape = draw.randint(1, 4 * rows), 16 * draw.randint(1, 350), 16 * draw.randint(1, 300)
        dtype, has_bias, stored = draw.choice([BF16, F16]), draw.random() < 0.5, draw.choice([E4M3, torch.int8])
        print(tiling, form, shape, dtype, has_bias, stored)  # shown if it fails
        many_rows = partial(rounded_gemm.many_rows, tiling)
        cases.check_rounded_linear("cuda", many_rows, stored, dtype, form, *shape, has_bias)
        cases.check_blockwise_linear("cuda", many_rows, dtype, form, *shape, has_bias)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 64), (4, 32), (4, 0), (8, 128), (8, 0)])
def test_products_of_grouped_integers(dtype, bits, group_size):
    is_symmetric = group_size == 64
    for inputs, out, form in (
        (4096, 6144, "plain"),
        (14_336, 4096, "float"),
        (1024, 6144, "silu"),
        (576, 960, "plain"),
    ):
        weight, plain = cases.grouped_weight("cuda", dtype, inputs, out, bits, group_size, is_symmetric)
        for rows in (1, 2, 8, 9, 16, 17, 33, 64, 100, 128, 200, 256, 600):
            has_bias = rows % 2 == 0
            cases.check_grouped_linear(grouped_gemm.product, weight, plain, form, rows, has_bias, is_rounded=True)


@ON_HOPPER
def test_random_tilings_of_grouped_integers():
    draw = random.Random()
    for _ in range(150):
        groups, parts, rows = draw.choice([1, 2]), draw.choice([1, 2]), draw.choice(gemm.MANY_ROWS)
        height, split = 16 * draw.randint(1, 4 * groups), draw.choice([1, 1, 2, 4])
        tiling = grouped_gemm.GroupedTiling(rows, groups, parts, height, split)
        form = draw.choice(gemm.FORMS if parts == 2 else gemm.FORMS[:2])
        kind = draw.choice([BF16, F16]), 8 * draw.randint(1, 700), 32 * draw.randint(8, 200)
        quantized = draw.choice([4, 4, 8]), draw.choice([0, 32, 64, 128, 192]), draw.random() < 0.5
        num_rows = draw.randint(1, 4 * rows)
        print(tiling, form, kind, quantized, num_rows)  # shown if it fails
        weight, plain = cases.grouped_weight("cuda", *kind, *quantized)
        product = partial(grouped_gemm.many_rows, tiling)
        cases.check_grouped_linear(product, weight, plain, form, num_rows, has_bias=quantized[2], is_rounded=True)


@ON_HOPPER
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("inputs", "out"), [(4096, 6144), (14_336, 4096), (1024, 6144), (576, 960)])
def test_rows_do_not_depend_on_the_batch(dtype, inputs, out):
    cases.check_batch_invariance("cuda", dtype, inputs, out, (1, 7, 16, 17, 64, 128, 200, 256, 1000))


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(64, 64), (80, 32), (80, 20), (96, 96), (128, 128), (128, 96), (256, 256), (40, 40)]
)
@pytest.mark.parametrize("norm", [None, "same", "float32"])
def test_rotate_and_store(dtype, head_dim, rotary_dim, norm):
    for heads in HEADS:
        norm_dtype = {None: None, "same": dtype, "float32": F32}[norm]
        cases.check_rotate_and_store("cuda", dtype, heads, head_dim, rotary_dim, norm_dtype)
        cases.check_rotate_and_store("cuda", dtype, heads, head_dim, rotary_dim, norm_dtype, torch.float8_e4m3fn)
    cases.check_rotate_and_store("cuda", dtype, (32, 8), head_dim, rotary_dim, norm_dtype, num_tokens=3000)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (100, 0.0), (0, 30.0), (1000, 50.0)])
def test_decodes_of_ragged_lengths(dtype, head_dim, window, softcap):
    for heads in HEADS:
        lengths = [(1, context) for context in (1, 15, 16, 17, 255, 1000, 4097)]
        cases.check_attention("cuda", dtype, heads, head_dim, lengths, window, softcap)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (333, 30.0)])
def test_decodes_from_an_fp8_cache(dtype, head_dim, window, softcap):
    for heads in HEADS:
        lengths = [(1, context) for context in (1, 15, 16, 17, 255, 1000, 4097)]
        cases.check_attention("cuda", dtype, heads, head_dim, lengths, window, softcap, E4M3)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (100, 0.0), (0, 30.0), (333, 50.0)])
def test_chunks_and_decodes_in_one_batch(dtype, head_dim, window, softcap):
    for heads in HEADS:
        lengths = [(1, 1), (1, 700), (1, 2000), (2, 2), (17, 400), (300, 300), (129, 1500), (1, 33)]
        cases.check_attention("cuda", dtype, heads, head_dim, lengths, window, softcap)


@pytest.mark.usefixtures("kernels")
def test_random_batches():
    draw = random.Random()
    for _ in range(40):
        num_kv_heads = draw.choice([1, 2, 8])
        heads = (num_kv_heads * draw.randint(1, 12), num_kv_heads)
        chunks = [draw.choice([1, 1, 1, draw.randint(2, 200)]) for _ in range(draw.randint(1, 40))]
        lengths = [(chunk, chunk + draw.choice([0, draw.randint(0, 3000)])) for chunk in sorted(chunks)]
        case = (draw.choice([BF16, F16]), heads, draw.choice([64, 80, 96, 128, 192, 256]), lengths)
        window, softcap = draw.choice([0, draw.randint(1, 500)]), draw.choice([0.0, 30.0])
        print(case, window, softcap)  # shown if it fails
        cases.check_attention("cuda", *case, window, softcap)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 131_072)],
        [(1, 40_000), (1, 3), (64, 50_000)],
        [(3000, 3000)],
        [(16, 8192)],
        [(2048, 2048), (16, 8192)],
        [*[(2, 600)] * 64, (512, 9000), (16, 8192)],
    ],
)
@pytest.mark.parametrize("window", [0, 4096])
def test_long_contexts(lengths, window):
    cases.check_attention("cuda", BF16, (8, 2), 128, lengths, window)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_chunks_than_a_warp_has_lanes(head_dim):
    lengths = [(1, 1 + i) for i in range(5)] + [(2 + i % 3 * 60, 2 + i % 3 * 60 + i) for i in range(70)]
    cases.check_attention("cuda", BF16, (32, 8), head_dim, lengths)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_padding_of_graphs(head_dim):
    decodes = [(1, 1 + 37 * i % 900) for i in range(64)]
    for lengths, padding in (
        ([*decodes, (300, 700)], (148, 190)),
        (decodes, (0, 64)),
        ([(1, 5)], (1, 0)),
        ([*decodes, (2, 2), (129, 1500), (17, 17)], (1000, 700)),
    ):
        cases.check_attention("cuda", BF16, (32, 8), head_dim, lengths, padding=padding)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (100, 0.0), (1000, 50.0)])
def test_chunks_change_no_bit(dtype, kv_dtype, head_dim, window, softcap):
    chunks = [1, 1, 1, 127, 1, 31, 33, 300, 64, 1, 1, 700, 5, 128, 1, 1024, *[1] * 40, 12]
    for heads in HEADS:
        cases.check_chunks_change_no_bit("cuda", dtype, heads, head_dim, chunks, window, softcap, kv_dtype)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("head_dim", [48, 64, 128, 256])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (333, 50.0)])
def test_chunks_from_a_narrow_cache(dtype, head_dim, window, softcap):
    for heads in HEADS:
        lengths = [(2, 2), (17, 400), (1, 700), (300, 300), (1, 33), (129, 1500), (1000, 1000)]
        cases.check_attention("cuda", dtype, heads, head_dim, lengths, window, softcap, torch.float8_e4m3fn)


def test_more_decodes_than_run_at_once():
    for _ in range(2):  # a second launch finds the counters of the first at zero
        lengths = [(1, 1 + 37 * i % 900) for i in range(200)] + [(1, 20_000)]
        cases.check_attention("cuda", BF16, (32, 8), 128, lengths)


def test_padding_among_decodes():
    cases.check_attention("cuda", BF16, (32, 8), 128, [(1, context) for context in (300, 0, 0, 5000, 0)])


def test_caches_of_more_than_two_billion_numbers():
    num_blocks = 2**31 // (8 * 16 * 128) + 10
    caches = torch.empty(2, num_blocks, 8, 16, 128, dtype=BF16, device="cuda")
    qkv = torch.randn(1, 24 * 128, device="cuda").bfloat16()
    slot = torch.tensor([(num_blocks - 1) * 16 + 5], dtype=torch.int32, device="cuda")
    angles = torch.cat([torch.ones(1, 64), torch.zeros(1, 64)], dim=1).cuda()
    cuda.rotate_and_store(qkv, torch.zeros_like(slot), slot, angles, *caches.unbind(), None, None, 0.0)
    stored = qkv.view(24, 128)[8:].view(2, 8, 128)
    assert torch.equal(caches[:, -1, :, 5], stored)


@pytest.mark.parametrize("vocab_size", [1000, 32_001, 49_152, 128_256])
@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
def test_gumbel_noise(vocab_size, position_dtype):
    cases.check_gumbel_noise("cuda", 9, vocab_size, position_dtype)


@pytest.mark.parametrize("vocab_size", [1000, 32_001, 128_256])
def test_masks_rule_out_what_they_do_on_a_cpu(vocab_size):
    logits = torch.randn(7, vocab_size)
    words = torch.randint(-(2**31), 2**31 - 1, (3, -(-vocab_size // 32)), dtype=torch.int32)
    rows = torch.tensor([5, 0, 6], dtype=torch.int32)
    masked = logits.cuda()
    cuda.mask_logits(masked, words.cuda(), rows.cuda())
    reference.mask_logits(logits, words, rows)
    assert torch.equal(masked.cpu(), logits)


@pytest.mark.parametrize("rows", [1, 7, 40, 70, 140, 300])  # 8 to 1 blocks share a row
@pytest.mark.parametrize(
    ("vocab_size", "spread"), [(1000, 3.0), (32_001, 2.0), (128_256, 3.0), (151_936, -2.0), (128_256, 10.0)]
)
def test_sample(rows, vocab_size, spread):
    requests = [random.choice(cases.SAMPLING) for _ in range(rows)] if rows < 40 else list(cases.SAMPLING)
    padded = requests + [{"temperature": 0}] * (rows - len(requests))
    cases.check_sample("cuda", vocab_size, padded, spread)


def test_draws_at_the_edge_of_what_is_kept():
    """So few tokens are kept, and so equal, that each of them is drawn in one of the rows."""
    for params in ({"top_k": 3}, {"top_p": 0.01}, {"top_p": 0.01, "top_k": 9}, {"min_p": 0.97}):
        cases.check_sample("cuda", 1000, [params] * 100, spread=0.3)


def test_logits_without_a_spread():
    cases.check_sample("cuda", 128_256, [{}, {"top_k": 50}, {"top_p": 0.9}, {"temperature": 0}], spread=0.0)
    cases.check_sample("cuda", 128_256, [{}, {"top_k": 50}, {"top_p": 0.9}, {"temperature": 0}], spread=1000.0)


def test_long_histories():
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.1, "top_p": 0.9}
    cases.check_sample("cuda", 151_936, [penalties] * 3, max_len=40_000)


@pytest.mark.parametrize("rows", [1, 64, 300])
@pytest.mark.parametrize("vocab_size", [7, 49_152, 50_257, 151_936])
def test_take_best(rows, vocab_size):
    cases.check_take_best("cuda", rows, vocab_size)


@pytest.mark.parametrize("repeats", [1, 5, 20])
@pytest.mark.parametrize("vocab_size", [1001, 50_257, 128_256])
def test_rows_without_a_token(repeats, vocab_size):
    cases.check_rows_without_a_token("cuda", vocab_size, repeats * cases.SAMPLING)


@pytest.mark.parametrize("rows", [1, 64, 300])
@pytest.mark.parametrize(("vocab_size", "spread"), [(50_257, 3.0), (151_936, -1.0), (128_256, 0.0)])
def test_logprobs(rows, vocab_size, spread):
    cases.check_logprobs("cuda", rows, vocab_size, 20, spread)


def test_ops_can_be_captured_in_a_graph():
    x, weight = torch.randn(5, 4096, device="cuda").bfloat16(), torch.randn(4096, device="cuda").bfloat16()
    cuda.rms_norm(x, weight, 1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda.rms_norm(x, weight, 1e-5)
    x.copy_(torch.randn(5, 4096))
    graph.replay()
    assert torch.equal(y, cuda.rms_norm(x, weight, 1e-5))


def test_warm_up_loads_every_kernel_that_runs(monkeypatch):
    cuda.warm_up(torch.device("cuda"), BF16, 128, 32, 8)
    monkeypatch.setattr(cuda.launcher, "cubin", lambda build: pytest.fail(f"{build} while serving"))
    cuda.kernels.loaded.cache_clear()
    cases.check_norms("cuda", BF16, BF16, 3, 4096)
    cases.check_attention("cuda", BF16, (32, 8), 128, [(1, 600), (30, 40)])
    cases.check_gumbel_noise("cuda", 3, 1000, torch.int64)
    cases.check_sample("cuda", 1000, [{"top_k": 5}])
