"""The CUDA kernels and their faces, emulated on the CPU: index arithmetic, masks and fragment layouts without a GPU."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from engine.ops import cuda
from engine.ops.compiler import Build
from engine.ops.cuda import grouped_gemm, rounded_gemm
from engine.ops.cuda.gemm import Tiling
from engine.ops.cuda.grouped_gemm import GroupedTiling
from tests.engine.ops import cuda_cases as cases
from tests.engine.ops import emulated_kernels

BF16, F16, F32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation is compiled by g++")


@pytest.fixture(scope="module", autouse=True)
def _emulated_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    libraries: dict[Build, dict[str, emulated_kernels.EmulatedKernel]] = {}

    def loaded(
        device: int, arch: str, name: str, make_build: Callable[..., Build], *constants: object
    ) -> emulated_kernels.EmulatedKernel:
        build = make_build(arch, *constants)
        if build not in libraries:
            libraries[build] = emulated_kernels.load(build, Path(tmp_path_factory.mktemp("kernels")))
        return libraries[build][name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.kernels, "loaded", loaded)
        patch.setattr(cuda.kernels, "num_sms", lambda device: 8)
        patch.setattr(cuda.kernels, "arch", lambda device: "sm_80")
        patch.setattr(cuda.launcher, "tensor_map", emulated_kernels.tensor_map)
        patch.setattr(cuda.launcher, "octets_map", emulated_kernels.tensor_map)
        patch.setattr(cuda.launcher, "plain_map", emulated_kernels.tensor_map)
        for module in (cuda.gemm, grouped_gemm, rounded_gemm):
            patch.setattr(module, "few_rows_ring_bytes", lambda arch: 184 << 10)
        torch.manual_seed(0)
        yield


@pytest.fixture(params=["chosen", "newest"])
def kernels(request, monkeypatch):
    """The attention kernels that are chosen by default, and the newest for all that they can do."""
    if request.param == "newest":
        monkeypatch.setattr(cuda.attention, "attention_files", cases.newest_attention_files)


@pytest.mark.parametrize(("dtype", "weight_dtype"), [(BF16, BF16), (F16, F32), (F32, F32)])
@pytest.mark.parametrize("dim", [64, 576, 5120])
def test_norms(dtype, weight_dtype, dim):
    cases.check_norms("cpu", dtype, weight_dtype, rows=3, dim=dim)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "rows", "dim"), [(BF16, BF16, 900, 64), (F16, F32, 210, 584), (F32, F32, 25, 2048)]
)
def test_norms_of_more_rows_than_blocks(dtype, weight_dtype, rows, dim):
    cases.check_norms("cpu", dtype, weight_dtype, rows, dim)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_gated_activation(dtype, kind):
    cases.check_gated_activation("cpu", dtype, kind, rows=3, dim=1096)


@pytest.mark.parametrize(
    ("dtype", "rows", "inputs", "out"),
    [
        (BF16, 1, 1024, 64),  # a tile for each block
        (F16, 5, 576, 1096),  # the last turn is not full
        (BF16, 8, 8, 256),  # one step, most of it past the inputs
        (BF16, 16, 328, 376),
        (F16, 11, 4104, 520),  # the ring goes round often
        (BF16, 9, 520, 64),
    ],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_of_few_rows(dtype, rows, inputs, out, has_bias):
    cases.check_linear("cpu", dtype, rows, inputs, out, has_bias)
    cases.check_gated_linear("cpu", dtype, "silu" if rows % 2 else "gelu_tanh", rows, inputs, out, has_bias)


@pytest.mark.parametrize(
    ("dtype", "rows", "inputs", "out"),
    [
        (BF16, 17, 2056, 120),  # tiles of 16 outputs
        (F16, 32, 3080, 248),  # of 32; the ring goes round
    ],
)
def test_linear_of_up_to_32_rows_on_hopper(monkeypatch, dtype, rows, inputs, out):
    monkeypatch.setattr(cuda.kernels, "arch", lambda device: "sm_90a")
    monkeypatch.setattr(cuda.gemm, "many_rows", None)
    cases.check_linear("cpu", dtype, rows, inputs, out, has_bias=True)
    cases.check_gated_linear("cpu", dtype, "silu", rows, inputs, out // 16 * 8, has_bias=False)


@pytest.mark.parametrize(
    ("dtype", "tiling", "form", "rows", "inputs", "out"),
    [
        (BF16, Tiling(16, 2, 2, 128), "plain", 5, 200, 136),  # inputs and outputs past the last
        (F16, Tiling(32, 1, 1, 32), "float", 30, 40, 200),  # blocks take several tiles
        (BF16, Tiling(64, 2, 2, 112), "silu", 33, 328, 272),
        (F16, Tiling(32, 2, 1, 40), "plain", 30, 456, 200),  # no outputs for the second warpgroup
        (BF16, Tiling(16, 1, 1, 64), "plain", 9, 840, 1096),  # seven steps: the turns change at each tile
        (BF16, Tiling(16, 1, 1, 16), "plain", 9, 72, 400),  # a step for two turns
        (BF16, Tiling(128, 1, 1, 64), "float", 128, 968, 1096),
        (BF16, Tiling(64, 1, 2, 48), "gelu_tanh", 70, 656, 176),  # two tiles of rows
        (BF16, Tiling(128, 2, 1, 96), "plain", 100, 704, 184),
        (BF16, Tiling(64, 2, 2, 128, cluster=2), "plain", 200, 640, 1000),
        (F16, Tiling(64, 2, 2, 80, cluster=2), "silu", 300, 72, 1600),  # an odd number of row tiles
        (BF16, Tiling(32, 1, 1, 64, cluster=4), "float", 100, 712, 600),
        (BF16, Tiling(64, 2, 1, 96, split=4), "plain", 60, 1096, 200),
        (F16, Tiling(16, 1, 2, 48, split=8), "silu", 12, 712, 176),  # fewer octets of rows, and of steps, than blocks
    ],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_of_many_rows_on_hopper(monkeypatch, dtype, tiling, form, rows, inputs, out, has_bias):
    monkeypatch.setattr(cuda.kernels, "arch", lambda device: "sm_90a")
    cases.check_many_rows("cpu", dtype, tiling, form, rows, inputs, out, has_bias)


@pytest.mark.parametrize(
    ("dtype", "bits", "group_size", "is_symmetric", "tiles", "form", "rows", "inputs", "out"),
    [
        (BF16, 4, 128, False, 1, "plain", 1, 1024, 72),  # the last sixteen is not full
        (F16, 4, 128, True, 3, "float", 5, 584, 400),  # nor is the last group, and blocks take several tiles
        (BF16, 4, 64, False, 4, "plain", 16, 328, 376),
        (BF16, 4, 32, False, 14, "silu", 7, 1608, 320),  # an odd number of groups
        (F16, 4, 32, True, 8, "plain", 8, 8, 256),  # most of the first chunk is past the inputs
        (BF16, 4, 0, False, 2, "float", 7, 40, 200),  # as is part of the one group
        (BF16, 4, 192, True, 3, "plain", 4, 1160, 200),  # groups of three chunks
        (BF16, 4, 0, False, 4, "gelu_tanh", 16, 4104, 544),  # the ring goes round often
        (BF16, 8, 128, False, 2, "plain", 3, 776, 200),
        (F16, 8, 0, True, 3, "plain", 16, 576, 96),
        (BF16, 8, 32, False, 8, "silu", 11, 520, 320),
    ],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_few_rows_of_grouped_integers(dtype, bits, group_size, is_symmetric, tiles, form, rows, inputs, out, has_bias):
    weight, plain = cases.grouped_weight("cpu", dtype, inputs, out, bits, group_size, is_symmetric)
    cases.check_grouped_linear(partial(grouped_gemm.few_rows, tiles), weight, plain, form, rows, has_bias)


@pytest.mark.parametrize(
    ("dtype", "bits", "group_size", "tiling", "form", "rows", "inputs", "out"),
    [
        (BF16, 4, 128, GroupedTiling(16, 1, 1, 16), "plain", 5, 200, 136),
        (F16, 4, 32, GroupedTiling(32, 1, 2, 64), "float", 30, 584, 200),  # blocks take several tiles
        (BF16, 4, 64, GroupedTiling(64, 2, 2, 112), "silu", 33, 328, 544),
        (BF16, 4, 128, GroupedTiling(64, 2, 1, 96), "plain", 140, 1096, 520),  # three tiles of rows
        (BF16, 4, 0, GroupedTiling(128, 2, 2, 128), "gelu_tanh", 100, 704, 320),
        (BF16, 4, 128, GroupedTiling(64, 2, 2, 128, split=4), "plain", 50, 1992, 520),
        (F16, 4, 32, GroupedTiling(32, 2, 1, 80, split=2), "float", 70, 200, 200),  # fewer inputs than a turn of both
        (BF16, 4, 128, GroupedTiling(16, 1, 2, 32, split=8), "silu", 12, 1160, 192),  # fewer octets than blocks
        (BF16, 4, 64, GroupedTiling(128, 1, 1, 64, split=8), "plain", 120, 72, 72),  # blocks without inputs
        (BF16, 8, 128, GroupedTiling(64, 2, 2, 128), "plain", 60, 776, 328),
        (F16, 8, 32, GroupedTiling(32, 1, 1, 48, split=2), "float", 20, 456, 104),
    ],
)
@pytest.mark.parametrize("is_symmetric", [False, True])
def test_many_rows_of_grouped_integers(
    monkeypatch, dtype, bits, group_size, tiling, form, rows, inputs, out, is_symmetric
):
    monkeypatch.setattr(cuda.kernels, "arch", lambda device: "sm_90a")
    weight, plain = cases.grouped_weight("cpu", dtype, inputs, out, bits, group_size, is_symmetric)
    product = partial(grouped_gemm.many_rows, tiling)
    cases.check_grouped_linear(product, weight, plain, form, rows, is_symmetric, is_rounded=True)


@pytest.mark.parametrize(
    ("dtype", "bits", "group_size", "inputs", "out"),
    [(BF16, 4, 128, 584, 72), (F16, 4, 32, 1608, 32), (BF16, 8, 64, 328, 40), (F16, 4, 0, 72, 16)],
)
def test_grouped_integers_become_wide(dtype, bits, group_size, inputs, out):
    weight, plain = cases.grouped_weight("cpu", dtype, inputs, out, bits, group_size, is_symmetric=False)
    with cases.poisoned():
        wide = grouped_gemm.widen(weight)
    assert torch.equal(wide, plain.to(dtype))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("form", "out"), [("plain", 144), ("silu", 160), ("silu", 144)])  # 72 outputs are no sixteens
def test_products_of_grouped_integers_of_any_number_of_rows(monkeypatch, arch, form, out):
    monkeypatch.setattr(cuda.kernels, "arch", lambda device: arch)
    weight, plain = cases.grouped_weight("cpu", BF16, 328, out, 4, 64, is_symmetric=False)
    for rows in (1, 20, 600):
        cases.check_grouped_linear(grouped_gemm.product, weight, plain, form, rows, is_rounded=True)


@pytest.mark.parametrize("stored", [E4M3, torch.int8])
@pytest.mark.parametrize(("dtype", "dim"), [(BF16, 64), (F16, 1096), (BF16, 17_000)])
def test_rows_are_rounded_to_eight_bits(stored, dtype, dim):
    cases.check_rounding("cpu", dtype, stored, rows=5, dim=dim)


@pytest.mark.parametrize("stored", [E4M3, torch.int8])
@pytest.mark.parametrize(
    ("octets", "form", "rows", "inputs", "out"),
    [(2, "plain", 1, 1040, 72), (6, "float", 16, 336, 376), (4, "silu", 7, 2064, 320)],
)
def test_few_rows_of_eight_bits(stored, octets, form, rows, inputs, out):
    few_rows = partial(rounded_gemm.few_rows, octets)
    cases.check_rounded_linear(
        "cpu", few_rows, stored, BF16 if rows % 2 else F16, form, rows, inputs, out, has_bias=rows > 1
    )


@pytest.mark.parametrize("stored", [E4M3, torch.int8])
@pytest.mark.parametrize(
    ("tiling", "form", "rows", "inputs", "out"),
    [
        (Tiling(16, 2, 2, 128), "plain", 5, 208, 136),
        (Tiling(64, 2, 2, 112), "silu", 33, 656, 272),
        (Tiling(32, 1, 1, 64, cluster=2), "float", 100, 1424, 600),
        (Tiling(32, 2, 1, 96, split=4), "float", 70, 2064, 200),  # three tiles of rows
        (Tiling(128, 2, 2, 128, split=2), "silu", 100, 656, 272),
    ],
)
def test_many_rows_of_eight_bits_on_hopper(monkeypatch, stored, tiling, form, rows, inputs, out):
    monkeypatch.setattr(cuda.kernels, "arch", lambda device: "sm_90a")
    many_rows = partial(rounded_gemm.many_rows, tiling)
    cases.check_rounded_linear("cpu", many_rows, stored, BF16, form, rows, inputs, out, has_bias=rows > 5)


@pytest.mark.parametrize(
    ("octets", "form", "rows", "inputs", "out"), [(2, "plain", 1, 1040, 200), (4, "silu", 11, 2192, 544)]
)
def test_few_rows_in_squares(octets, form, rows, inputs, out):
    few_rows = partial(rounded_gemm.few_rows, octets)
    cases.check_blockwise_linear("cpu", few_rows, BF16, form, rows, inputs, out, has_bias=rows > 1)


@pytest.mark.parametrize(
    ("tiling", "form", "rows", "inputs", "out"),
    [
        (Tiling(16, 2, 2, 96), "plain", 5, 208, 408),
        (Tiling(64, 1, 2, 56), "silu", 33, 656, 272),
        (Tiling(32, 2, 1, 128, split=4), "plain", 70, 1424, 200),
    ],
)
def test_many_rows_in_squares_on_hopper(monkeypatch, tiling, form, rows, inputs, out):
    monkeypatch.setattr(cuda.kernels, "arch", lambda device: "sm_90a")
    many_rows = partial(rounded_gemm.many_rows, tiling)
    cases.check_blockwise_linear("cpu", many_rows, BF16, form, rows, inputs, out, has_bias=rows > 5)


@pytest.mark.parametrize(("out", "rows", "parts"), [(112, 64, 1), (304, 128, 1), (1008, 128, 2)])
def test_rows_on_hopper_do_not_depend_on_the_batch(monkeypatch, out, rows, parts):
    """The tiles of more than 128 rows are small ones, wide ones or the largest."""
    monkeypatch.setattr(cuda.kernels, "arch", lambda device: "sm_90a")
    tiling = cuda.gemm.many_rows_tiling(130, out, "plain", num_sms=8, in_order=True)
    assert (tiling.rows, tiling.parts) == (rows, parts)
    cases.check_batch_invariance("cpu", BF16, 200, out, (1, 16, 17, 60, 130))


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "rotary_dim", "norm"),
    [
        (BF16, (9, 3), 64, 64, None),
        (F16, (4, 1), 80, 20, F32),
        (BF16, (24, 8), 128, 96, BF16),
        (F32, (2, 1), 256, 256, F32),
        (BF16, (3, 1), 40, 40, F32),  # a head of an odd number of pieces
    ],
)
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
def test_rotate_and_store(dtype, heads, head_dim, rotary_dim, norm, kv_dtype):
    cases.check_rotate_and_store("cpu", dtype, heads, head_dim, rotary_dim, norm, kv_dtype)


@pytest.mark.parametrize("num_tokens", [1, 300])
def test_rotate_and_store_of_few_and_many_tokens(num_tokens):
    cases.check_rotate_and_store("cpu", BF16, (6, 2), 64, 64, BF16, num_tokens=num_tokens)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "heads", "head_dim", "window", "softcap"),
    [
        (BF16, BF16, (6, 2), 64, 0, 0.0),
        (F16, F16, (4, 1), 80, 40, 0.0),
        (BF16, BF16, (16, 1), 128, 0, 0.0),
        (F16, F16, (18, 1), 128, 30, 0.0),  # more heads than one block takes
        (F32, F32, (11, 1), 128, 0, 20.0),  # also here
        (BF16, BF16, (2, 1), 256, 100, 30.0),
        (BF16, E4M3, (4, 1), 128, 0, 0.0),
        (F16, E4M3, (10, 1), 80, 100, 20.0),
    ],
)
def test_decodes_of_ragged_lengths(monkeypatch, arch, dtype, kv_dtype, heads, head_dim, window, softcap):
    monkeypatch.setattr(cuda.kernels, "arch", lambda device: arch)
    lengths = [(1, 1), (1, 16), (1, 17), (1, 700)]
    cases.check_attention("cpu", dtype, heads, head_dim, lengths, window, softcap, kv_dtype)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    "contexts",
    [
        [7000],  # one list for all blocks of threads
        [2900, 1, 1, 3000, 1, 400, 400],  # lists that are cut beside lists that are not
        [700, 900, *[1] * 60],  # lists of few blocks, which count for more
        [*range(1, 160, 4)],  # many lists in a share, of more tokens than a warp has lanes
        [0, 30, 0, 0, 500, 0],  # requests that are padding
    ],
)
def test_decodes_are_shared_out_evenly_whatever_their_contexts(monkeypatch, arch, contexts):
    monkeypatch.setattr(cuda.kernels, "arch", lambda device: arch)
    for _ in range(2):  # a second launch finds the counters of the first at zero
        cases.check_attention("cpu", BF16, (4, 2), 64, [(1, context) for context in contexts])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "window", "softcap"),
    [
        (BF16, (6, 2), 64, 0, 0.0),
        (F16, (2, 2), 80, 40, 0.0),
        (BF16, (4, 1), 128, 70, 20.0),
        (BF16, (2, 1), 256, 0, 0.0),
    ],
)
def test_chunks_and_decodes_in_one_batch(dtype, heads, head_dim, window, softcap):
    lengths = [(1, 1), (1, 300), (2, 2), (30, 30), (70, 200), (1, 90)]
    cases.check_attention("cpu", dtype, heads, head_dim, lengths, window, softcap)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "window", "softcap"),
    [
        (BF16, (4, 1), 128, 0, 0.0),
        (F16, (6, 2), 64, 70, 0.0),
        (BF16, (3, 1), 128, 100, 20.0),
    ],
)
def test_chunks_and_decodes_on_hopper(monkeypatch, dtype, heads, head_dim, window, softcap):
    monkeypatch.setattr(cuda.kernels, "arch", lambda device: "sm_90a")
    lengths = [(1, 300), (2, 2), (30, 130), (128, 128), (70, 500), (1, 90)]
    cases.check_attention("cpu", dtype, heads, head_dim, lengths, window, softcap)


@pytest.mark.parametrize(
    "lengths",
    [
        [(3, 2900)],  # an item of each KV head, in parts
        [(1, 1), (2, 2), (5, 2000), (200, 700)],  # whole items beside parts, and more of them
        [(80, 2200), (1, 1500), (1, 600)],  # both warpgroups have rows; not all items have as many parts
    ],
)
@pytest.mark.parametrize(
    ("heads", "head_dim", "window", "kv_dtype"),
    [((4, 2), 64, 0, BF16), ((2, 1), 128, 0, E4M3), ((4, 1), 128, 1500, BF16)],
)
def test_long_contexts_of_few_rows_are_cut_on_hopper(monkeypatch, lengths, heads, head_dim, window, kv_dtype):
    monkeypatch.setattr(cuda.attention, "attention_files", cases.newest_attention_files)
    monkeypatch.setattr(cuda.kernels, "arch", lambda device: "sm_90a")
    for _ in range(2):  # a second launch finds the counters of the first at zero
        cases.check_attention("cpu", BF16, heads, head_dim, lengths, window, kv_dtype=kv_dtype, padding=(0, 3))


def test_more_chunks_on_hopper_than_lanes_look_for(monkeypatch):
    monkeypatch.setattr(cuda.kernels, "arch", lambda device: "sm_90a")
    lengths = [(2 + i % 3 * 60, 2 + i % 3 * 60 + i) for i in range(70)]
    cases.check_attention("cpu", BF16, (4, 1), 64, lengths)


@pytest.mark.parametrize(("arch", "head_dim"), [("sm_80", 64), ("sm_80", 256), ("sm_90a", 64), ("sm_90a", 128)])
def test_padding_of_graphs(monkeypatch, arch, head_dim):
    monkeypatch.setattr(cuda.kernels, "arch", lambda device: arch)
    for lengths, padding in (([(1, 200), (1, 1), (40, 60)], (23, 45)), ([(1, 5)], (0, 3)), ([(3, 3)], (70, 0))):
        cases.check_attention("cpu", BF16, (4, 2), head_dim, lengths, padding=padding)


@pytest.mark.parametrize(("arch", "head_dim"), [("sm_80", 64), ("sm_80", 256), ("sm_90a", 64), ("sm_90a", 128)])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (50, 20.0)])
def test_chunks_change_no_bit(monkeypatch, arch, head_dim, window, softcap):
    monkeypatch.setattr(cuda.kernels, "arch", lambda device: arch)
    cases.check_chunks_change_no_bit("cpu", BF16, (4, 2), head_dim, [1, 1, 30, 97, 1, 70], window, softcap)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("arch", "head_dim"), [("sm_80", 48), ("sm_80", 256), ("sm_90a", 64), ("sm_90a", 128)])
@pytest.mark.parametrize(("dtype", "window"), [(BF16, 0), (F16, 70)])
def test_chunks_from_a_narrow_cache(monkeypatch, arch, head_dim, dtype, window):
    monkeypatch.setattr(cuda.kernels, "arch", lambda device: arch)
    lengths = [(2, 2), (30, 130), (1, 300), (70, 500), (128, 128)]
    cases.check_attention("cpu", dtype, (3, 1), head_dim, lengths, window, kv_dtype=torch.float8_e4m3fn)


def test_chunks_in_float32():
    cases.check_attention("cpu", F32, (4, 2), 64, [(1, 40), (5, 5), (20, 70)], window=30)


@pytest.mark.parametrize("vocab_size", [1000, 1001])
def test_gumbel_noise(vocab_size):
    cases.check_gumbel_noise("cpu", 3, vocab_size, torch.int32)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(("vocab_size", "spread"), [(1000, 3.0), (1001, -1.0), (1000, 20.0)])
def test_sample(monkeypatch, vocab_size, spread, blocks):
    monkeypatch.setattr(cuda.sampling, "_blocks_per_row", lambda logits: blocks)
    cases.check_sample("cpu", vocab_size, list(cases.SAMPLING), spread)


def test_sample_with_more_tokens_than_are_counted_at_a_time():
    cases.check_sample("cpu", 9001, [{"repetition_penalty": 1.5, "frequency_penalty": 0.5, "top_k": 3}])


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("vocab_size", [7, 1000, 9001])
def test_take_best(monkeypatch, vocab_size, blocks):
    monkeypatch.setattr(cuda.sampling, "_blocks_per_row", lambda logits: blocks)
    cases.check_take_best("cpu", 3, vocab_size)


def test_rows_without_a_token(monkeypatch):
    monkeypatch.setattr(cuda.sampling, "_blocks_per_row", lambda logits: 2)
    others = [{"temperature": 0}, {"top_p": 0.9}, {"top_k": 20, "repetition_penalty": 1.3}]
    cases.check_rows_without_a_token("cpu", 401, [{}] * 6 + others)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(("vocab_size", "num_top", "spread"), [(1000, 5, 3.0), (1001, 20, -0.2), (7, 0, 1.0)])
def test_logprobs(monkeypatch, vocab_size, num_top, spread, blocks):
    monkeypatch.setattr(cuda.sampling, "_blocks_per_row", lambda logits: blocks)
    cases.check_logprobs("cpu", 2, vocab_size, num_top, spread)
