"""Products with weights of grouped integers.

gemm/few_rows_grouped.cu for up to 16 rows, gemm/many_rows_grouped.cu on Hopper for those of larger decode batches. For
more rows, and on other GPUs, the weight is made wide each time, and the product is cuBLAS's.
"""

import math
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
    FORMS,
    GATED_FORMS,
    MANY_ROWS,
    MANY_ROWS_SHARED_BYTES,
    few_rows_ring_bytes,
    is_batch_invariant,
)
from engine.ops.cuda.grouped_weight import CHUNK, OUTPUTS, SMALL_GROUP, PackedWeight
from engine.ops.cuda.kernels import check_rows, define_build, kernel, pointer
from engine.ops.cuda.rows import gated_activation
from engine.quantization.weight import ALL

FEW_ROWS = (1, 8, 16)  # builds of gemm/few_rows_grouped.cu, by the most rows they take
FEW_ROWS_TILES = (1, 2, 3, 4, 8, 14)  # its kernels, by the sixteens of outputs in a tile: 14 of up to 8 rows
MOST_ROWS = 512  # for gemm/many_rows_grouped.cu


def builds(arch: str, dtype: torch.dtype, bits: int, group_size: int) -> Iterator[Build]:
    """The builds for weights of groups of this size, or of ALL inputs."""
    sizes = (CHUNK, 2 * CHUNK) if group_size == ALL else (group_size,)  # all inputs are whole pairs of chunks, or not
    for rows in FEW_ROWS:
        for groups in sorted({_groups_in(2, size) for size in sizes}):
            yield few_rows_build(arch, dtype, bits, groups, rows)
    groups = _groups_in(1, sizes[0])
    if arch == "sm_90a":
        for rows in MANY_ROWS:
            yield many_rows_build(arch, dtype, bits, groups, rows)
    yield widen_build(arch, dtype, bits, groups)


def few_rows_build(arch: str, dtype: torch.dtype, bits: int, groups: int, rows: int) -> Build:
    """groups: in two chunks of 64 inputs, 1, 2 or 4."""
    file, ring_bytes = "gemm/few_rows_grouped.cu", few_rows_ring_bytes(arch)
    return define_build(
        arch, file, ring_bytes, scalar=dtype, bits=bits, groups=groups, rows=rows, ring_bytes=ring_bytes
    )


def many_rows_build(arch: str, dtype: torch.dtype, bits: int, groups: int, rows: int) -> Build:
    """groups: in a chunk, 1 or 2."""
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
    split: int = 1  # blocks that share out the inputs of a tile: 1, 2, 4 or 8

    def num_output_tiles(self, out: int) -> int:
        """out: rows of the weight"""
        return -(-out // (self.parts * self.height))


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None, form: str) -> Tensor:
    """x · Wᵀ + bias in one of FORMS: by whatever is fastest, or by the kernel whose rows do not know the batch."""
    num_rows, arch, num_sms = len(x), kernels.arch(x.get_device()), kernels.num_sms(x.get_device())
    if form in GATED_FORMS and weight.out_features % (2 * OUTPUTS):
        return gated_activation(product(x, weight, bias, "plain"), form)
    is_aligned = weight.out_features % (16 if form in GATED_FORMS else 2) == 0
    if num_rows and is_aligned:
        if num_rows <= FEW_ROWS[-1] and not is_batch_invariant():
            tiles = few_rows_tiles(num_rows, weight.out_features, weight.bits, form, num_sms, few_rows_ring_bytes(arch))
            if tiles:
                return few_rows(tiles, x, weight, bias, form)
        if arch == "sm_90a" and (num_rows <= MOST_ROWS or is_batch_invariant()):
            # The sums of a row have the order of one tiling, if it is not to know the batch.
            rows, may_split = (MANY_ROWS[-1], False) if is_batch_invariant() else (num_rows, True)
            shape = weight.in_features, weight.out_features
            tiling = many_rows_tiling(rows, *shape, form, num_sms, may_split)
            return many_rows(tiling, x, weight, bias, form)
    y = F.linear(x, widen(weight), bias)
    return gated_activation(y, form) if form in GATED_FORMS else y


def few_rows_tiles(num_rows: int, out: int, bits: int, form: str, num_sms: int, ring_bytes: int) -> int:
    """Sixteens of outputs in a tile of gemm/few_rows_grouped.cu.   out: rows of the weight

    0 where none will do: two chunks must fit the ring. The end of a tile takes about as long as a sixteen more.
    Measured on an H200, in us, the four products of a layer of Llama 3.1 8B: 1 row 41.9, 8 rows 40.1.
    """
    rows = next(n for n in FEW_ROWS if num_rows <= n)
    sizes = [
        tiles
        for tiles in FEW_ROWS_TILES
        if 2 * 8 * (tiles * (128 * bits + 128) + 128 * rows) <= ring_bytes
        and (tiles < 14 or rows <= 8)
        and (form not in GATED_FORMS or tiles % 2 == 0)
    ]
    return min(sizes, key=lambda tiles: -(-out // (16 * tiles * num_sms)) * (tiles + 1), default=0)


@cache
def many_rows_tiling(num_rows: int, inputs: int, out: int, form: str, num_sms: int, may_split: bool) -> GroupedTiling:
    """The tiling that should take the least time.   out: rows of the weight

    A step of a block (four warpgroups, each 64 inputs of 64 outputs) takes as long as the slowest of these, in cycles:
    the warps that widen the weight, the tensor cores, and what the L2 cache delivers. Measured on an H200: never more
    than 8 % slower than the fastest tiling of Llama 3.1 8B's products.
    """
    rows = next((n for n in MANY_ROWS if num_rows <= n), MANY_ROWS[-1])

    def cycles(tiling: GroupedTiling) -> float:
        panels = 4 // (tiling.groups * tiling.parts)
        tiles, at_once = -(-num_rows // rows) * tiling.num_output_tiles(out), num_sms // tiling.split
        if tiling.split > 1 and tiles > at_once:
            return math.inf  # the blocks of a cluster have one tile
        step = max(700, 8 * rows, (128 * panels * rows + 4 * 64 * 36) / 32)
        num_steps = -(-inputs // (CHUNK * panels * tiling.split))
        return -(-tiles // at_once) * (num_steps * step + 3000) + (2000 if tiling.split > 1 else 0)

    shapes = [(2, 2), (1, 2)] if form in GATED_FORMS else [(2, 2), (2, 1), (1, 2), (1, 1)]
    splits = (1, 2) if may_split else (1,)
    return min((GroupedTiling(rows, *shape, 64 * shape[0], split) for shape in shapes for split in splits), key=cycles)


# All three kernels read the weight while the one launched last may still run: that one must not be what writes it.


def few_rows(tiles: int, x: Tensor, weight: PackedWeight, bias: Tensor | None, form: str) -> Tensor:
    num_rows, inputs = x.shape
    y = _new_result(x, weight, form)
    rows = next(n for n in FEW_ROWS if num_rows <= n)
    num_tiles = -(-len(weight.packed) // tiles)
    groups = _groups_in(2, weight.group_size)
    kernel(x, f"few_rows_grouped_{tiles}", few_rows_build, x.dtype, weight.bits, groups, rows)(
        (min(kernels.num_sms(x.get_device()), num_tiles), 1, 1),
        256,
        *(y.data_ptr(), x.data_ptr(), weight.packed.data_ptr(), weight.scales.data_ptr(), pointer(bias)),
        *(FORMS.index(form), num_rows, inputs, y.shape[1], weight.scales.shape[1], _inverse(weight)),
    )
    return y


def many_rows(tiling: GroupedTiling, x: Tensor, weight: PackedWeight, bias: Tensor | None, form: str) -> Tensor:
    num_rows, inputs = x.shape
    y = _new_result(x, weight, form)
    sixteens, groups, box = len(weight.packed), _groups_in(1, weight.group_size), tiling.height // OUTPUTS
    row_length, grid_length = 2 * weight.packed[0].numel(), 2 * weight.scales[0].numel()  # in 16 bits
    num_output_tiles = tiling.num_output_tiles(weight.out_features)
    num_tiles = -(-num_rows // tiling.rows) * num_output_tiles
    blocks = num_tiles * tiling.split if tiling.split > 1 else min(num_tiles, kernels.num_sms(x.get_device()))
    name = f"many_rows_grouped_{tiling.groups}x{tiling.parts}"
    kernel(x, name, many_rows_build, x.dtype, weight.bits, groups, tiling.rows)(
        (blocks, 1, 1),
        640,
        launcher.plain_map(weight.packed.data_ptr(), sixteens, row_length, box, 256),
        launcher.plain_map(weight.scales.data_ptr(), sixteens, grid_length, box, 32 * groups),
        launcher.tensor_map(x.data_ptr(), num_rows, inputs, tiling.rows),
        *(y.data_ptr(), pointer(bias), FORMS.index(form), num_rows, inputs, y.shape[1], tiling.height),
        *(num_output_tiles, _inverse(weight)),
        cluster=tiling.split,
    )
    return y


def widen(weight: PackedWeight) -> Tensor:
    """The weight [out, in] in x's type."""
    y = weight.packed.new_empty(weight.out_features, weight.in_features, dtype=weight.dtype)
    sixteens, chunks = weight.packed.shape[:2]
    groups = _groups_in(1, weight.group_size)
    kernel(y, "widen_grouped", widen_build, y.dtype, weight.bits, groups)(
        (-(-chunks // 8), sixteens, 1),
        256,
        *(y.data_ptr(), weight.packed.data_ptr(), weight.scales.data_ptr()),
        *(weight.out_features, weight.in_features, weight.scales.shape[1], _inverse(weight)),
    )
    return y


def _groups_in(chunks: int, group_size: int) -> int:
    """How many groups so many chunks have, or, where they may lie in several, chunks."""
    if group_size == SMALL_GROUP:
        return 2 * chunks
    return 1 if group_size % (chunks * CHUNK) == 0 else chunks


def _inverse(weight: PackedWeight) -> int:
    """For group_of in gemm/grouped.cuh, where groups hold whole chunks, or one holds all inputs."""
    return -(-(1 << 30) // -(-weight.group_size // CHUNK))


def _new_result(x: Tensor, weight: PackedWeight, form: str) -> Tensor:
    assert (x.dtype, x.shape[1]) == (weight.dtype, weight.in_features), (x.dtype, x.shape, weight)
    check_rows(x)
    out = weight.out_features // 2 if form in GATED_FORMS else weight.out_features
    return x.new_empty(len(x), out, dtype=torch.float32 if form == "float" else x.dtype)
