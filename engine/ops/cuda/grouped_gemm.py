"""Products with weights of grouped integers.

gemm/few_rows_grouped.cu for up to 16 rows, gemm/many_rows_grouped.cu on Hopper for those of larger decode batches. For
more rows, and on other GPUs, the weight is made wide each time, and the product is cuBLAS's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import launcher
from engine.ops.compiler import Build
from engine.ops.cuda import kernels
from engine.ops.cuda.gemm import (
    FEW_ROWS,
    FORMS,
    GATED_FORMS,
    MANY_ROWS,
    MANY_ROWS_SHARED_BYTES,
    few_rows_ring_bytes,
    is_batch_invariant,
)
from engine.ops.cuda.grouped_weight import CHUNK, OUTPUTS, PackedWeight
from engine.ops.cuda.kernels import check_rows, define_build, kernel, pointer
from engine.ops.cuda.rows import gated_activation

FEW_ROWS_TILES = (1, 2, 3, 4, 6, 8)  # kernels of gemm/few_rows_grouped.cu, by the sixteens of outputs in a tile
MOST_ROWS = 512  # for gemm/many_rows_grouped.cu


def builds(arch: str, dtype: torch.dtype, bits: int, group_size: int) -> Iterator[Build]:
    """The builds for weights of these groups."""
    groups = _groups_of_chunk(group_size)
    for rows in FEW_ROWS:
        yield few_rows_build(arch, dtype, bits, groups, rows)
    if arch == "sm_90a":
        for rows in MANY_ROWS:
            yield many_rows_build(arch, dtype, bits, groups, rows)
    yield widen_build(arch, dtype, bits, groups)


def few_rows_build(arch: str, dtype: torch.dtype, bits: int, groups: int, rows: int) -> Build:
    """groups: in a chunk of 64 inputs, 1 or 2."""
    file, ring_bytes = "gemm/few_rows_grouped.cu", few_rows_ring_bytes(arch)
    return define_build(
        arch, file, ring_bytes, scalar=dtype, bits=bits, groups=groups, rows=rows, ring_bytes=ring_bytes
    )


def many_rows_build(arch: str, dtype: torch.dtype, bits: int, groups: int, rows: int) -> Build:
    file, block_bytes = "gemm/many_rows_grouped.cu", MANY_ROWS_SHARED_BYTES
    return define_build(
        arch, file, block_bytes, scalar=dtype, bits=bits, groups=groups, rows=rows, block_bytes=block_bytes
    )


def widen_build(arch: str, dtype: torch.dtype, bits: int, groups: int) -> Build:
    return define_build(arch, "gemm/widen_grouped.cu", scalar=dtype, bits=bits, groups=groups)


@dataclass(frozen=True)
class GroupedTiling:
    """How gemm/many_rows_grouped.cu cuts a product up: tiles of `rows` rows of x and `parts` times `height` outputs."""

    rows: int
    groups: int  # warpgroups that compute, each up to 64 outputs of each part
    parts: int
    height: int  # sixteens
    split: int = 1  # blocks that share out the inputs of a tile


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None, form: str) -> Tensor:
    """x · Wᵀ + bias in one of FORMS: by whatever is fastest, or by the kernel whose rows do not know the batch."""
    num_rows, arch, num_sms = len(x), kernels.arch(x.get_device()), kernels.num_sms(x.get_device())
    if form in GATED_FORMS and weight.out_features % (2 * OUTPUTS):
        return gated_activation(product(x, weight, bias, "plain"), form)
    is_aligned = weight.out_features % (16 if form in GATED_FORMS else 2) == 0
    if num_rows and is_aligned:
        if num_rows <= FEW_ROWS[-1] and not is_batch_invariant():
            tiles = few_rows_tiles(num_rows, weight.out_features, weight.bits, form, num_sms, few_rows_ring_bytes(arch))
            return few_rows(tiles, x, weight, bias, form)
        if arch == "sm_90a" and (num_rows <= MOST_ROWS or is_batch_invariant()):
            most_split = 1 if is_batch_invariant() else 8
            tiling = many_rows_tiling(
                num_rows, weight.in_features, weight.out_features, weight.bits, form, num_sms, most_split
            )
            return many_rows(tiling, x, weight, bias, form)
    y = F.linear(x, widen(weight), bias)
    return gated_activation(y, form) if form in GATED_FORMS else y


def few_rows_tiles(num_rows: int, out: int, bits: int, form: str, num_sms: int, ring_bytes: int) -> int:
    """Sixteens of outputs in a tile of gemm/few_rows_grouped.cu.   out: rows of the weight

    A multiprocessor is to read little. Two steps must fit the ring.
    """
    octets = FEW_ROWS[0] if num_rows <= FEW_ROWS[0] else FEW_ROWS[1]
    sizes = [
        tiles
        for tiles in FEW_ROWS_TILES
        if 2 * 8 * (tiles * (128 * bits + 128) + octets * 128) <= ring_bytes
        and (form not in GATED_FORMS or tiles % 2 == 0)
    ]
    return min(sizes, key=lambda tiles: -(-out // (16 * tiles * num_sms)) * (2 * bits * tiles + 2 * num_rows))


@cache
def many_rows_tiling(
    num_rows: int, inputs: int, out: int, bits: int, form: str, num_sms: int, most_split: int
) -> GroupedTiling:
    """The tiling that should take the least time.   out: rows of the weight

    An input takes a block as long as the slowest of these: the tensor cores (2,048 products a cycle), the widening of
    the weight (100 instructions for each warp and chunk), and the L2 cache (24 bytes a cycle and multiprocessor).
    """
    rows = next((n for n in MANY_ROWS if num_rows <= n), MANY_ROWS[-1])
    row_tiles, is_gated = -(-num_rows // rows), form in GATED_FORMS
    best: tuple[float, GroupedTiling] | None = None
    for groups, parts in ((1, 1), (1, 2), (2, 1), (2, 2)):
        if is_gated and parts == 1:
            continue
        for height in range(OUTPUTS, 64 * groups + 1, OUTPUTS):
            tiles = row_tiles * -(-out // (parts * height))
            for split in (1, 2, 4, 8):
                if split > most_split or (split > 1 and tiles * split > num_sms):
                    break
                rounds = -(-tiles * split // num_sms)
                tensor, widen = groups * parts * rows / 32, groups * parts * 100 / CHUNK
                l2 = (parts * height * bits / 8 + 2 * rows) / 24
                cycles = inputs / split * max(tensor, widen, l2)
                sums = groups * parts * rows * 4 if split > 1 else 0  # cycles to add them up
                cost = rounds * (cycles + 1500) + (2000 + sums / 4 if split > 1 else 0)
                if best is None or cost < best[0]:
                    best = cost, GroupedTiling(rows, groups, parts, height, split)
    assert best is not None
    return best[1]


# All three kernels read the weight while the one launched last may still run: that one must not be what writes it.


def few_rows(tiles: int, x: Tensor, weight: PackedWeight, bias: Tensor | None, form: str) -> Tensor:
    num_rows, inputs = x.shape
    y = _new_result(x, weight, form)
    rows = next(n for n in FEW_ROWS if num_rows <= n)
    num_tiles = -(-len(weight.packed) // tiles)
    groups = _groups_of_chunk(weight.group_size)
    kernel(x, f"few_rows_grouped_{tiles}", few_rows_build, x.dtype, weight.bits, groups, rows)(
        (min(kernels.num_sms(x.get_device()), num_tiles), 1, 1),
        256,
        *(y.data_ptr(), x.data_ptr(), weight.packed.data_ptr(), weight.scales.data_ptr(), pointer(bias)),
        *(FORMS.index(form), num_rows, inputs, y.shape[1], weight.scales.shape[1], _chunks_of_group(weight)),
    )
    return y


def many_rows(tiling: GroupedTiling, x: Tensor, weight: PackedWeight, bias: Tensor | None, form: str) -> Tensor:
    num_rows, inputs = x.shape
    y = _new_result(x, weight, form)
    sixteens, groups, box = len(weight.packed), _groups_of_chunk(weight.group_size), tiling.height // OUTPUTS
    row_length, grid_length = 2 * weight.packed[0].numel(), 2 * weight.scales[0].numel()  # in 16 bits
    num_tiles = -(-num_rows // tiling.rows) * -(-weight.out_features // (tiling.parts * tiling.height))
    blocks = num_tiles * tiling.split if tiling.split > 1 else min(num_tiles, kernels.num_sms(x.get_device()))
    name = f"many_rows_grouped_{tiling.groups}x{tiling.parts}"
    kernel(x, name, many_rows_build, x.dtype, weight.bits, groups, tiling.rows)(
        (blocks, 1, 1),
        128 * (tiling.groups + 1),
        launcher.plain_map(weight.packed.data_ptr(), sixteens, row_length, box, 256),
        launcher.plain_map(weight.scales.data_ptr(), sixteens, grid_length, box, 32 * groups),
        launcher.tensor_map(x.data_ptr(), num_rows, inputs, tiling.rows),
        *(y.data_ptr(), pointer(bias), FORMS.index(form), num_rows, inputs, y.shape[1], tiling.height),
        _chunks_of_group(weight),
        cluster=tiling.split,
    )
    return y


def widen(weight: PackedWeight) -> Tensor:
    """The weight [out, in] in x's type."""
    y = weight.packed.new_empty(weight.out_features, weight.in_features, dtype=weight.dtype)
    sixteens, chunks = weight.packed.shape[:2]
    groups = _groups_of_chunk(weight.group_size)
    kernel(y, "widen_grouped", widen_build, y.dtype, weight.bits, groups)(
        (-(-chunks // 8), sixteens, 1),
        256,
        *(y.data_ptr(), weight.packed.data_ptr(), weight.scales.data_ptr()),
        *(weight.out_features, weight.in_features, weight.scales.shape[1], _chunks_of_group(weight)),
    )
    return y


def _groups_of_chunk(group_size: int) -> int:
    return 2 if group_size < CHUNK else 1


def _chunks_of_group(weight: PackedWeight) -> int:
    """Where groups hold whole chunks, or one holds all inputs."""
    return -(-weight.group_size // CHUNK)


def _new_result(x: Tensor, weight: PackedWeight, form: str) -> Tensor:
    assert (x.dtype, x.shape[1]) == (weight.dtype, weight.in_features), (x.dtype, x.shape, weight)
    check_rows(x)
    out = weight.out_features // 2 if form in GATED_FORMS else weight.out_features
    return x.new_empty(len(x), out, dtype=torch.float32 if form == "float" else x.dtype)
