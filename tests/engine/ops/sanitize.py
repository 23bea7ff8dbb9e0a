"""Every CUDA kernel once, on small shapes and against float64, for NVIDIA's checkers of memory and of races:

    compute-sanitizer --tool memcheck python -m tests.engine.ops.sanitize
    compute-sanitizer --tool racecheck python -m tests.engine.ops.sanitize rows sampling gemm

Runs what is named, or all; all ends with exit code 1 if a kernel of kernels/*.cu has not run.
"""

import os
import sys
from collections.abc import Callable
from functools import partial

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # every tensor ends where its memory ends

import torch

from engine.ops import cuda
from engine.ops.compiler import Build, signatures
from engine.ops.cuda import grouped_gemm as grouped
from engine.ops.cuda import rounded_gemm as rounded
from engine.ops.launcher import Kernel
from engine.ops.sources import kernels_folder
from tests.engine.ops import cuda_cases as cases

BF16, F32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
MIXED = [(1, 1), (1, 150), (2, 2), (30, 130), (70, 90)]
CHUNKS = [(2, 2), (30, 130), (70, 90), (3, 1500)]  # the last is cut into parts
DECODES = [(1, 1), (1, 16), (1, 17), (1, 400)]


def rows() -> None:
    for weight_dtype in (BF16, F32):
        for num_rows, dim in ((3, 576), (500, 4096)):
            cases.check_norms("cuda", BF16, weight_dtype, num_rows, dim)
    for kind in ("silu", "gelu_tanh"):
        cases.check_gated_activation("cuda", BF16, kind, rows=3, dim=1096)
    for kv_dtype in (BF16, E4M3):
        cases.check_rotate_and_store("cuda", BF16, (6, 2), 128, 96, BF16, kv_dtype)


def gemm() -> None:
    for num_rows, out in ((5, 1096), (16, 4224), (9, 6336), (1, 8448), (130, 1096)):  # tiles of all sizes
        cases.check_linear("cuda", BF16, num_rows, 584, out, has_bias=True)
    for out in (1096, 4096):  # few rows of long ones
        cases.check_linear("cuda", BF16, 30, 2056, out, has_bias=True)
    for groups, parts, form in ((1, 1, "float"), (1, 2, "silu"), (2, 1, "plain"), (2, 2, "gelu_tanh")):
        tiling = cuda.gemm.Tiling(64, groups, parts, 64 * groups, cluster=groups)
        cases.check_many_rows("cuda", BF16, tiling, form, 130, 584, 1104, has_bias=True)
    cases.check_gated_linear("cuda", BF16, "silu", 5, 584, 1096, has_bias=True)


def rounded_gemm() -> None:
    for stored in (E4M3, torch.int8):
        cases.check_rounding("cuda", BF16, stored, 5, 1096)
        for octets in cuda.gemm.FEW_ROWS_OCTETS:
            few_rows = partial(rounded.few_rows, octets)
            for num_rows in (5, 16):
                cases.check_rounded_linear("cuda", few_rows, stored, BF16, "plain", num_rows, 592, 1104, True)
        for groups, parts, cluster, split in ((1, 1, 1, 2), (1, 2, 2, 1), (2, 1, 1, 4), (2, 2, 1, 1)):
            tiling = cuda.gemm.Tiling(64, groups, parts, 64 * groups, cluster, split)
            many_rows = partial(rounded.many_rows, tiling)
            cases.check_rounded_linear("cuda", many_rows, stored, BF16, "plain", 130, 592, 1104, True)
    cases.check_blockwise_linear("cuda", few_rows, BF16, "plain", 5, 592, 1104, True)
    cases.check_blockwise_linear("cuda", many_rows, BF16, "plain", 130, 592, 1104, True)


def grouped_gemm() -> None:
    for bits in (4, 8):
        weight, plain = cases.grouped_weight("cuda", BF16, 584, 1104, bits, 128, is_symmetric=False)
        assert torch.equal(grouped.widen(weight), plain.to(BF16))
        for tiles in grouped.FEW_ROWS_TILES:
            for num_rows in (1, 5, 16) if tiles < 14 else (1, 5):
                cases.check_grouped_linear(partial(grouped.few_rows, tiles), weight, plain, "plain", num_rows, True)
        for groups, parts, split in ((1, 1, 2), (1, 2, 1), (2, 1, 1), (2, 2, 2)):
            tiling = grouped.GroupedTiling(64, groups, parts, 64 * groups, split)
            product = partial(grouped.many_rows, tiling)
            cases.check_grouped_linear(product, weight, plain, "plain", 130, True, is_rounded=True)


def attention() -> None:
    for kv_dtype in (BF16, E4M3):
        for head_dim in (64, 128):
            cases.check_attention("cuda", BF16, (6, 2), head_dim, CHUNKS, kv_dtype=kv_dtype, padding=(5, 3))
    for head_dim, window, softcap in ((64, 0, 0.0), (128, 0, 0.0), (128, 50, 30.0), (256, 0, 0.0), (40, 0, 0.0)):
        for lengths in (DECODES, MIXED):
            cases.check_attention("cuda", BF16, (6, 2), head_dim, lengths, window, softcap)
    cases.check_attention("cuda", F32, (6, 2), 64, [(1, 3000)])


def newest_attention() -> None:
    chosen = cuda.attention.attention_files
    cuda.attention.attention_files = cases.newest_attention_files
    attention()
    cuda.attention.attention_files = chosen


def sampling() -> None:
    cases.check_gumbel_noise("cuda", 3, 1001, torch.int64)
    cases.check_sample("cuda", 1001, list(cases.SAMPLING))
    cases.check_sample("cuda", 9000, [{"repetition_penalty": 1.5, "top_k": 9, "top_p": 0.9}])
    cases.check_take_best("cuda", 3, 1001)
    cases.check_rows_without_a_token("cuda", 1001, cases.SAMPLING)
    cases.check_logprobs("cuda", 3, 1001, 5)


CHECKS = {
    check.__name__: check for check in (rows, gemm, rounded_gemm, grouped_gemm, attention, newest_attention, sampling)
}


def main(names: list[str]) -> int:
    used: set[tuple[str, str]] = set()
    loaded = cuda.kernels.loaded

    def record(device: int, arch: str, name: str, make_build: Callable[..., Build], *constants: object) -> Kernel:
        used.add((make_build(arch, *constants).file, name))
        return loaded(device, arch, name, make_build, *constants)

    cuda.kernels.loaded = record
    torch.manual_seed(0)
    for name in names or CHECKS:
        CHECKS[name]()
    torch.cuda.synchronize()
    folder = kernels_folder()
    files = {str(path.relative_to(folder)): signatures(path.read_text()) for path in folder.rglob("*.cu")}
    missing = {(file, name) for file, names in files.items() for name in names} - used
    print(f"{len(used)} kernels ran; not {sorted(missing)}" if missing else f"all {len(used)} kernels ran")
    return 1 if missing and not names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
