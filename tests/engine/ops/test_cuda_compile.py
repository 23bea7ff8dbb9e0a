"""Every kernel compiles for every kind of model, without a GPU, and keeps its numbers in registers."""

import re
from dataclasses import replace

import pytest
import torch

from engine.cache import cache_folder
from engine.errors import UserError
from engine.ops import compiler, cuda, launcher
from engine.ops.cuda import gemm, quantized, rounded_gemm
from engine.ops.sources import kernels_folder
from engine.quantization.weight import ALL, Scheme

pytest.importorskip("cuda.bindings")

MODELS = {  # head size, query heads to a KV head
    "SmolLM2 135M": (64, 3),
    "Phi-2": (80, 1),
    "Phi-3 mini": (96, 1),
    "Qwen3 0.6B": (128, 2),
    "Llama 3.1 8B": (128, 4),
    "Qwen2.5 7B": (128, 7),
    "Gemma 2 9B": (256, 2),
    "Llama 3.1 70B, Qwen3 30B-A3B": (128, 8),
}
TYPES = {  # of the model and of its KV cache
    "sm_80": (
        *((dtype, dtype) for dtype in (torch.bfloat16, torch.float32)),
        (torch.bfloat16, torch.float8_e4m3fn),
    ),
    "sm_90a": (
        *((dtype, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
        *((dtype, torch.float8_e4m3fn) for dtype in (torch.bfloat16, torch.float16)),
    ),
}
BUILDS = {
    build
    for arch, types in TYPES.items()
    for dtype, kv_dtype in types
    for head_dim, heads_per_kv in MODELS.values()
    for build in cuda.model_builds(arch, dtype, head_dim, heads_per_kv, kv_dtype=kv_dtype)
}
INT4, INT8 = Scheme("int", 4, (1, 128)), Scheme("int", 8, (1, 128))
QUANTIZED = (
    ("sm_80", torch.bfloat16, [INT4, Scheme("int", 8, (1, ALL), rounds_inputs=True)]),
    ("sm_90a", torch.bfloat16, [INT4, INT8, Scheme("float", 8, (1, ALL), rounds_inputs=True)]),
    ("sm_90a", torch.float16, [Scheme("int", 4, (1, 32)), Scheme("int", 8, (1, ALL), rounds_inputs=True)]),
    ("sm_90a", torch.bfloat16, [Scheme("float", 8, (128, 128), rounds_inputs=True)]),
)
BUILDS |= {build for case in QUANTIZED for build in quantized.builds(*case)}
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spills(float* x, int n) {  // 64 registers a thread, and 128 numbers
  float own[128];
  for (int i = 0; i < 128; i++) own[i] = x[threadIdx.x + 1024 * i];
  for (int turn = 0; turn < n; turn++)
    for (int i = 0; i < 128; i++) own[i] = own[i] * own[(i + 1) % 128] + own[(i + 37) % 128];
  for (int i = 0; i < 128; i++) x[threadIdx.x + 1024 * i] = own[i];
}
"""


def compile_in_registers(build: compiler.Build) -> list[str]:
    """The names of a build's kernels. AssertionError if one of them keeps a number in memory."""
    code, log = compiler.compile_source(build, ["--ptxas-options=-v"])
    assert code.startswith(b"\x7fELF")
    assert "warning" not in log, log
    names = re.findall(r"entry function '(\w+)'", log)
    uses = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(uses) >= len(names) > 0, log
    assert set(uses) == {("0", "0", "0")}, log
    return names


@pytest.mark.parametrize("build", sorted(BUILDS, key=str), ids=lambda build: " ".join((build.file, *build.options[2:])))
def test_kernel_compiles_and_spills_nothing(build):
    assert sorted(compile_in_registers(build)) == sorted(compiler.signatures(compiler.source(build.file)))


@pytest.mark.parametrize("arch", TYPES)
def test_a_spill_would_be_found(monkeypatch, arch):
    monkeypatch.setattr(compiler, "source", lambda file: SPILLING)
    with pytest.raises(AssertionError, match=r"[1-9]\d* bytes spill stores"):
        compile_in_registers(compiler.Build("spilling.cu", arch))


def test_every_kernel_file_is_compiled():
    files = {path.relative_to(kernels_folder()).as_posix() for path in kernels_folder().rglob("*.cu")}
    assert {build.file for build in BUILDS} == files  # for each GPU, what models run on there


def test_a_second_build_comes_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build = compiler.Build("activation.cu", "sm_90a", ("SCALAR=bf16",))
    first = compiler.cubin(build)
    monkeypatch.setattr(compiler, "compile_source", lambda build: pytest.fail("compiled again"))
    assert compiler.cubin(build) == first
    assert [path.suffix for path in cache_folder("kernels").iterdir()] == [".cubin"]


def test_a_changed_header_is_a_new_build(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build = compiler.Build("activation.cu", "sm_90a", ("SCALAR=bf16",))
    compiler.cubin(build)
    headers = compiler._headers()
    monkeypatch.setattr(compiler, "_headers", lambda: {**headers, "types.cuh": headers["types.cuh"] + "// new\n"})
    compiler.cubin(build)
    assert len(list(cache_folder("kernels").iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiler.cubin(compiler.Build("activation.cu", "sm_90a", ("SCALAR=bf16",))).startswith(b"\x7fELF")


def test_a_mistake_in_a_kernel_is_told_with_the_compilers_words(monkeypatch):
    monkeypatch.setattr(compiler, "source", lambda file: "int x = y;")
    with pytest.raises(RuntimeError, match=r"broken\.cu.*sm_90a[\s\S]*identifier \"y\" is undefined"):
        compiler.compile_source(compiler.Build("broken.cu", "sm_90a"))


def test_what_kernels_cannot_do_is_told():
    with pytest.raises(UserError, match=r"7\.5.*8\.0"):
        compiler.arch_of((7, 5))
    with pytest.raises(UserError, match="not 20"):
        list(cuda.model_builds("sm_90a", torch.bfloat16, 20, 1))
    with pytest.raises(UserError, match=r"float64.*--dtype"):
        list(cuda.model_builds("sm_90a", torch.float64, 64, 1))
    with pytest.raises(UserError, match=r"sm_999.*pip install"):
        compiler.compile_source(compiler.Build("norm.cu", "sm_999", ("SCALAR=bf16",)))


def test_a_machine_without_a_driver_is_told_what_to_install():
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    with pytest.raises(UserError, match=r"driver.*vcli\[cuda\]"):
        launcher._driver()


@pytest.mark.parametrize(
    ("num_blocks", "max_context", "splits"),
    [(8, 128_000, 66), (8, 1000, 4), (8, 100, 1), (512, 8192, 2), (2048, 8192, 1), (1, 10**6, 128)],
)
def test_contexts_are_split_while_multiprocessors_are_idle(num_blocks, max_context, splits):
    assert cuda.attention.num_splits(num_blocks, max_context, num_sms=132) == splits


@pytest.mark.parametrize("group", [1, 7, 8, 16])
@pytest.mark.parametrize("head_dim", range(16, 257, 16))
@pytest.mark.parametrize(("arch", "limit"), [("sm_86", 99), ("sm_80", 163), ("sm_90a", 227)])
def test_decode_fits_every_gpu(arch, limit, head_dim, group):
    group = cuda.attention.decode_group(head_dim, group)
    _, stages, shared_bytes = cuda.attention.decode_tile(arch, torch.bfloat16, head_dim, group)
    assert shared_bytes <= limit << 10
    assert stages >= 3  # one to work on, others on their way


@pytest.mark.parametrize("head_dim", range(16, 257, 16))
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_prefill_fits_small_gpus(kv_dtype, head_dim):
    assert cuda.attention.prefill_shared_bytes(kv_dtype, head_dim) <= 99 << 10


@pytest.mark.parametrize("head_dim", [64, 128])
def test_prefill_on_hopper_fits_its_shared_memory(head_dim):
    assert (
        cuda.attention.attention_files("sm_90a", torch.bfloat16, head_dim, is_masked=False)[1]
        == "attention/prefill_sm90.cu"
    )
    assert (
        cuda.attention.attention_files("sm_80", torch.bfloat16, head_dim, is_masked=False)[1] == "attention/prefill.cu"
    )
    assert cuda.attention.prefill_sm90_shared_bytes(head_dim) <= 227 << 10


def test_tensor_maps_are_parameters_by_value():
    text = (
        'extern "C" __global__ void __launch_bounds__(kThreads, 1)\nf(const __grid_constant__ TensorMap map, int n) {'
    )
    assert compiler.signatures(text) == {"f": "128si"}


@pytest.mark.parametrize(
    ("rows", "inputs", "out", "octets"),
    [
        (1, 4096, 6144, 6),  # one tile for each of 128 multiprocessors
        (1, 4096, 4096, 4),
        (1, 2048, 1024, 2),
        (8, 1024, 151_936, 8),  # many turns: large tiles read x seldom
        (17, 4096, 4096, 0),  # the rest is for cuBLAS
        (1, 4096, 32_001, 0),
        (1, 4100, 4096, 0),
    ],
)
def test_products_of_few_rows_are_shared_out_evenly(rows, inputs, out, octets):
    assert cuda.gemm.few_rows_octets(rows, inputs, out, 132, cuda.gemm.few_rows_ring_bytes("sm_90a")) == octets


@pytest.mark.parametrize(
    ("rows", "out", "form", "tiling"),
    [
        (64, 28_672, "silu", gemm.Tiling(64, 2, 2, 112)),  # 128 tiles for 132 multiprocessors
        (17, 6144, "silu", gemm.Tiling(32, 1, 2, 48)),
        (64, 6144, "plain", gemm.Tiling(64, 1, 1, 48)),
        (128, 128_256, "float", gemm.Tiling(128, 2, 1, 128)),
        (256, 28_672, "silu", gemm.Tiling(128, 2, 2, 128, cluster=2)),
    ],
)
def test_products_of_many_rows_are_shared_out_evenly(rows, out, form, tiling):
    assert gemm.many_rows_tiling(rows, out, form, num_sms=132) == tiling


@pytest.mark.parametrize(
    ("rows", "inputs", "out", "octets"),
    [
        (8, 4096, 4096, 4),  # as elsewhere
        (1, 1024, 4096, 6),  # 86 tiles, of two steps
        (17, 4096, 4096, 4),
        (32, 2048, 1024, 2),
        (32, 1024, 4096, 0),  # rows too short,
        (32, 4096, 6144, 0),  # several tiles: the rest is for gemm/many_rows.cu
        (33, 4096, 4096, 0),
    ],
)
def test_products_of_up_to_32_rows_have_a_kernel_on_hopper(rows, inputs, out, octets):
    ring_bytes = gemm.few_rows_ring_bytes("sm_90a")
    assert gemm.few_rows_octets_on_hopper(rows, inputs, out, 132, ring_bytes) == octets


def test_an_order_of_inputs_takes_tiles_without_turns():
    tiling = gemm.many_rows_tiling(64, 4096, "plain", num_sms=132)
    assert gemm.many_rows_tiling(64, 4096, "plain", num_sms=132, in_order=True) == replace(tiling, groups=2)


@pytest.mark.parametrize(
    ("rows", "inputs", "out", "tiling"),
    [
        (64, 14_336, 4096, gemm.Tiling(64, 1, 1, 64, split=2)),  # 64 tiles, 128 blocks
        (64, 2048, 1024, gemm.Tiling(64, 1, 2, 48, split=8)),
        (128, 4096, 6144, gemm.Tiling(128, 2, 1, 64)),
        (128, 4096, 4096, gemm.Tiling(128, 2, 1, 64, split=2)),
        (96, 4096, 4096, None),
        (64, 4096, 6144, None),
    ],
)
def test_blocks_share_out_inputs_where_layers_are_faster_so(rows, inputs, out, tiling):
    assert gemm.shared_tiling(rows, inputs, out, "plain", num_sms=132) == tiling


@pytest.mark.parametrize("rows", gemm.MANY_ROWS)
@pytest.mark.parametrize("parts", [1, 2])
def test_each_warpgroup_of_many_rows_has_two_stages_at_least(rows, parts):
    for height in range(8, 129, 8):
        for groups in (1, 2) if height <= 64 else (2,):
            _, _, _, stages, *_ = gemm.Tiling(rows, groups, parts, height).arguments(rows, 4096, 4096)
            assert 2 <= stages <= 32
            assert groups == 2 or (stages >= 4 and stages % 2 == 0), "each turn has stages of its own"


@pytest.mark.parametrize(
    ("rows", "inputs", "out", "form", "tiling"),
    [  # the fastest ones of a sweep on an H200
        (16, 4096, 6144, "plain", gemm.Tiling(16, 1, 1, 64)),
        (64, 4096, 4096, "plain", gemm.Tiling(64, 1, 1, 64)),
        (64, 14_336, 4096, "plain", gemm.Tiling(64, 1, 1, 64, split=2)),
        (64, 4096, 28_672, "silu", gemm.Tiling(64, 2, 2, 112)),
        (128, 4096, 6144, "plain", gemm.Tiling(64, 2, 1, 128)),
        (128, 14_336, 4096, "plain", gemm.Tiling(64, 1, 1, 64)),
        (256, 4096, 6144, "plain", gemm.Tiling(128, 2, 1, 128)),
        (256, 4096, 4096, "plain", gemm.Tiling(64, 2, 1, 128)),
        (192, 4096, 4096, "plain", gemm.Tiling(64, 2, 1, 128)),
    ],
)
def test_products_of_eight_bits_take_tiles_of_whole_warpgroups(rows, inputs, out, form, tiling):
    assert rounded_gemm.rounded_tiling(rows, inputs, out, form, num_sms=132) == tiling


def test_many_rows_are_for_hopper_and_for_decodes():
    assert any("many_rows" in build.file for build in gemm.builds("sm_90a", torch.bfloat16))
    assert not any("many_rows" in build.file for build in gemm.builds("sm_80", torch.bfloat16))
    assert gemm.many_rows_pays(128, 28_672, "silu", 132)
    assert not gemm.many_rows_pays(129, 28_672, "silu", 132)
    many = [rows for rows in range(256, 2049, 128) if gemm.many_rows_pays(rows, 28_672, "silu", 132)]
    assert many == [256, 1024, 1280, 1792, 2048]


def test_small_gpus_take_small_tiles():
    assert cuda.gemm.few_rows_octets(16, 4096, 28672, 84, cuda.gemm.few_rows_ring_bytes("sm_86")) == 2
