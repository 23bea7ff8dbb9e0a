"""Matrix products: gemm/few_rows.cu for up to 16 rows (on Hopper some of up to 32), gemm/many_rows.cu on Hopper beyond,
where it is faster than cuBLAS, and cuBLAS for the rest."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import UserError
from engine.ops import launcher
from engine.ops.compiler import Build
from engine.ops.cuda import kernels
from engine.ops.cuda.kernels import check_rows, define_build, kernel, pointer
from engine.ops.cuda.rows import gated_activation

FORMS = ("plain", "float", "silu", "gelu_tanh")  # of a product's result, as in gemm/forms.cuh
GATED_FORMS = FORMS[2:]
FEW_ROWS = (8, 16)  # builds of gemm/few_rows.cu, by the most rows they take
FEW_ROWS_ON_HOPPER = (*FEW_ROWS, 32)
FEW_ROWS_OCTETS = (2, 4, 6, 8)  # its kernels, by the eights of outputs in a tile
MANY_ROWS = (16, 32, 64, 128)  # builds of gemm/many_rows.cu, by the rows of a tile
BUSY = 0.94  # share of gemm/many_rows.cu's time in which tiles of more than 128 rows must keep multiprocessors busy
MANY_ROWS_SHARED_BYTES = 227 << 10  # of a block of it: all that Hopper has

_is_batch_invariant = False


def use_batch_invariant(is_on: bool) -> None:
    """Whether each row's results come from the same sums in the same order, however many rows there are."""
    global _is_batch_invariant
    _is_batch_invariant = is_on


def is_batch_invariant() -> bool:
    return _is_batch_invariant


def builds(arch: str, dtype: torch.dtype) -> Iterator[Build]:
    if dtype is torch.float32:
        return
    for rows in FEW_ROWS_ON_HOPPER if arch == "sm_90a" else FEW_ROWS:
        yield few_rows_build(arch, dtype, rows)
    if arch == "sm_90a":
        for rows in MANY_ROWS:
            yield many_rows_build(arch, dtype, rows)


def few_rows_build(arch: str, dtype: torch.dtype, rows: int) -> Build:
    has_four_eights = rows == FEW_ROWS_ON_HOPPER[-1]
    ring_bytes = few_rows_ring_bytes(arch) + (8 << 10 if has_four_eights else 0)  # three steps of 32 outputs
    return define_build(arch, "gemm/few_rows.cu", ring_bytes, scalar=dtype, rows=rows, ring_bytes=ring_bytes)


def many_rows_build(arch: str, dtype: torch.dtype, rows: int) -> Build:
    block_bytes = MANY_ROWS_SHARED_BYTES
    return define_build(arch, "gemm/many_rows.cu", block_bytes, scalar=dtype, rows=rows, block_bytes=block_bytes)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x, weight, bias, "plain")


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return _product(x, weight, bias, kind)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return _product(hidden, weight, None, "float")


@dataclass(frozen=True)
class Tiling:
    """How gemm/many_rows.cu cuts a product up: into tiles of `rows` rows of x and `parts` times `height` outputs."""

    rows: int
    groups: int  # of up to 64 outputs of each part: two warpgroups have one each, or take turns at the steps of one
    parts: int
    height: int
    cluster: int = 1  # blocks that bring the weight together, for as many row tiles
    split: int = 1  # blocks that share out the inputs of a tile; where there are some, `cluster` is 1

    def blocks(self, num_rows: int, out: int, num_sms: int) -> int:
        """Blocks alone and those that share a weight take the tiles in turns, those that share inputs have one.

        out: rows of the weight.
        """
        num_units = self._row_units(num_rows) * self._output_tiles(out)
        return num_units * self.split if self.split > 1 else min(num_sms // self.cluster, num_units) * self.cluster

    def rounds(self, num_rows: int, out: int, num_sms: int) -> int:
        """Of tiles, where multiprocessors take them in turns."""
        return -(-self._row_units(num_rows) * self._output_tiles(out) // (num_sms // self.cluster))

    def share_busy(self, num_rows: int, out: int, num_sms: int) -> float:
        """Of the multiprocessors' time in these: rows that a tile lacks count as idle."""
        places = self.rounds(num_rows, out, num_sms) * (num_sms // self.cluster)
        return num_rows * self._output_tiles(out) / (places * self.rows * self.cluster)

    def arguments(self, num_rows: int, inputs: int, out: int) -> tuple[int, ...]:
        """What its kernels take to know their tiles, from `height` on. inputs: numbers of 16 bits; out: as above."""
        panels = 2 if self.groups == self.parts == 1 and self.rows < 128 else 1  # of 64 inputs, as in many_rows.cu
        row_bytes, most_stages = 128, 32
        other_turn = 16 if self.groups == 2 else self.parts * self.rows * 64 * 4
        front = self.groups * min(self.rows, 64) * row_bytes + other_turn + 2 * 8 * most_stages
        front = -(-front // 1024) * 1024
        read_past_end = max(0, 64 * self.groups - self.height - panels * self.rows) * row_bytes
        stage = panels * (self.parts * self.height + self.rows) * row_bytes
        stages = min(most_stages, (MANY_ROWS_SHARED_BYTES - 1024 - front - read_past_end) // stage)
        if self.groups == 1:  # an even number, so that a stage is one warpgroup's: who skips phases of a barrier, which
            stages -= stages % 2  # tells but odd ones from even ones, may take what is still to come for what has come
        share = -(-inputs // (64 * panels * self.split))
        tiles = (self._output_tiles(out), self._row_units(num_rows))
        return (self.height, *tiles, stages, self.cluster, self.split, share)

    def _row_units(self, num_rows: int) -> int:
        return -(-num_rows // (self.rows * self.cluster))

    def _output_tiles(self, out: int) -> int:
        return -(-out // (self.parts * self.height))


def few_rows_octets(num_rows: int, inputs: int, out: int, num_sms: int, ring_bytes: int) -> int:
    """Eights of outputs in a tile of gemm/few_rows.cu; 0 where cuBLAS is to be called.

    A multiprocessor reads the weights and x for each of its tiles: that is to be little. Two steps must fit the ring.
    Measured on an H200, in us, 28 layers of Qwen3 0.6B and 8 of Llama 3.1 8B without attention: 1 row 491 and 892 (with
    cuBLAS 991 and 1,033), 8 rows 543 and 918 (834 and 1,051), 16 rows and the logits 686 and 1,206 (942 and 1,314).
    """
    if not 0 < num_rows <= FEW_ROWS[-1] or inputs % 8 or out % 8:
        return 0
    halves = -(-num_rows // 8)
    sizes = [octets for octets in FEW_ROWS_OCTETS if 2 * (octets + halves) * 8192 <= ring_bytes]
    return min(sizes, key=lambda octets: -(-out // (8 * octets * num_sms)) * (8 * octets + num_rows))


def few_rows_octets_on_hopper(num_rows: int, inputs: int, out: int, num_sms: int, ring_bytes: int) -> int:
    """The same on Hopper, where up to 32 rows pay while a multiprocessor has one tile, of long rows: there they read x
    once, and the steps of gemm/many_rows.cu take longer than the memory.

    Measured on an H200, in us, 32 rows; gemm/many_rows.cu in brackets. Llama 3.1 8B: 4096 to 4096 10.5 (11.4), 14336 to
    4096 29.9 (31.1); Qwen3 0.6B: 2048 to 1024 3.3 (4.8), 3072 to 1024 4.2 (6.5), 1024 to 4096 4.5 (4.1).

    Where rows are so short that a tile is two steps, a third of the multiprocessors is left to the next kernel. So a
    layer of Qwen3 0.6B, with attention, takes 23.2 us instead of 24.6, of 8 rows 27.8 (28.9), of 16 32.8 (33.7).
    """
    is_short = inputs <= 1024 and inputs % 8 == 0 and out % 8 == 0
    if is_short and 0 < num_rows <= FEW_ROWS[-1] and num_sms // 2 <= -(-out // 48) <= num_sms:
        return 6
    if not FEW_ROWS[-1] < num_rows <= FEW_ROWS_ON_HOPPER[-1]:
        return few_rows_octets(num_rows, inputs, out, num_sms, ring_bytes)
    if inputs < 2048 or inputs % 8 or out % 8:
        return 0
    return next((octets for octets in FEW_ROWS_OCTETS[:2] if out <= 8 * octets * num_sms), 0)


def few_rows_ring_bytes(arch: str) -> int:
    """Shared memory of a block of gemm/few_rows.cu for copies in flight: all that there is on large GPUs."""
    return {"sm_80": 120 << 10, "sm_90a": 184 << 10, "sm_100a": 184 << 10}.get(arch, 64 << 10)


def many_rows_tiling(num_rows: int, out: int, form: str, num_sms: int, in_order: bool = False) -> Tiling:
    """Tiles as high as may be of those that give all multiprocessors as much to do. Lower ones would read x too often.

    out: rows of the weight. in_order: whether an output is to be summed up in the order of the inputs; beyond 128 rows
    it always is. There the tiles are those that take the least time, if one takes as long as if it had 64 rows more.
    Measured on an H200, in us, 14336 to 4096, the largest tiles in brackets: 56 (135) for 256 rows, 81 (135) for 512.
    """
    columns, parts = (out // 2, 2) if form in GATED_FORMS else (out, 1)
    if num_rows > MANY_ROWS[-1]:
        tilings = [Tiling(128, 2, 2, 128, cluster=2)]
        if parts == 1:
            tilings += [Tiling(128, 2, 1, 128, cluster=2), Tiling(64, 2, 1, 128)]
        return min(tilings, key=lambda each: each.rounds(num_rows, out, num_sms) * (each.rows + 64) * each.parts)
    groups = 1 if columns <= 64 * num_sms and not in_order else 2
    rounds = -(-columns // (64 * groups * num_sms))
    height = -(-columns // (8 * rounds * num_sms)) * 8
    rows = next(n for n in MANY_ROWS if num_rows <= n)
    return Tiling(rows, groups, parts, max(height, 48 if parts == 2 else rows // 2, 16))


def many_rows_pays(num_rows: int, out: int, form: str, num_sms: int) -> bool:
    """Whether gemm/many_rows.cu is faster than cuBLAS (and the activation, which it saves).

    Measured on an H200, in us, weights rotating in a graph; cuBLAS in brackets.

    | inputs, out (of Llama 3.1 8B) | 32 rows | 64 | 128 | 256 | 1024 | 8192 |
    |---|---|---|---|---|---|---|
    | 4096, 28672 gated | 57 (65) | 58 (65) | 63 (72) | 94 (97) | 322 (337) | 2,835 (2,958) |
    | 14336, 4096 | 31.9 (33.8) | 34.5 (35.8) | 48.8 (38.1) | | | |
    | 4096, 6144 | 14.3 (16.3) | 15.4 (16.4) | 18.9 (16.6) | | | |
    | 4096, 4096 | 11.6 (14.0) | 12.4 (12.6) | 15.8 (14.2) | | | |
    | 4096, 128256 to float | 256 (270) | 262 (289) | 288 (290) | 447 (397) | | |

    Beyond 128 rows it takes 44 us for each round of tiles, however few are in the last one: 91 (88) for 224 rows, 91
    (92) for 240, 176 (162) for 512, 260 (255) for 768, 309 (322) for 1,024, 392 (402) for 1,280. In whole steps a
    prompt of 2,048 tokens takes 45.4 ms (48.6), of 8,192 201 (207), and a decode of 256 requests 11.3 (11.5). Qwen3
    0.6B, 1024 to 6144 gated: 26.2 (24.1) for 1,024 rows, 40.9 (46.8) for 2,048, 173 (188) for 8,192.
    """
    if num_rows <= 64:
        return form != "plain" or num_rows <= 32 or out >= 28 * num_sms
    is_wide = form in GATED_FORMS and out > 128 * num_sms
    if num_rows <= MANY_ROWS[-1]:
        return form == "float" or is_wide
    busy = many_rows_tiling(num_rows, out, form, num_sms).share_busy(num_rows, out, num_sms)
    return form in GATED_FORMS and (busy > BUSY or (is_wide and 240 <= num_rows <= 256))


def shared_tiling(num_rows: int, inputs: int, out: int, form: str, num_sms: int) -> Tiling | None:
    """Tilings that give more multiprocessors work, or each less to wait for, where whole layers are faster with them.

    Measured on an H200, in us, a layer of a decode step with attention over 576 tokens; before, with cuBLAS but for
    `down` of 64 rows, in brackets. Llama 3.1 8B: 64 rows, down 168.2 (170.0); 128 rows, down, o and qkv 215.7 (221.5).
    Qwen3 0.6B: 64 rows, o 73.1 (75.6). Of 96 rows all are slower.
    """
    if form != "plain":
        return None
    if 112 < num_rows <= 128 and inputs >= 4096 and out <= 64 * num_sms:
        return Tiling(128, 2, 1, 64, split=2 if 2 * -(-out // 64) <= num_sms else 1)
    if 32 < num_rows <= 64 and inputs >= 8192 and out <= 32 * num_sms:
        return Tiling(64, 1, 1, 64, split=2)
    if 32 < num_rows <= 64 and 1024 < inputs <= 2048 and out <= 8 * num_sms:
        return Tiling(64, 1, 2, 48, split=8)
    return None


def _tiling(num_rows: int, inputs: int, out: int, form: str, num_sms: int) -> Tiling | None:
    """How gemm/many_rows.cu is to cut a product up; None where cuBLAS is faster."""
    if _is_batch_invariant:
        return many_rows_tiling(num_rows, out, form, num_sms, in_order=True)
    if tiling := shared_tiling(num_rows, inputs, out, form, num_sms):
        return tiling
    return many_rows_tiling(num_rows, out, form, num_sms) if many_rows_pays(num_rows, out, form, num_sms) else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """x · weightᵀ + bias in one of FORMS: by whatever is fastest, or by the kernel whose rows do not know the batch."""
    device, (num_rows, inputs), out = x.get_device(), x.shape, len(weight)
    arch, num_sms, is_wide = kernels.arch(device), kernels.num_sms(device), x.dtype is torch.float32
    is_aligned = inputs % 8 == 0 and out % {"float": 1, "plain": 8}.get(form, 16) == 0  # 16 bytes move at a time
    if num_rows and is_aligned and not is_wide:
        ring_bytes = few_rows_ring_bytes(arch)
        octets_of_tile = few_rows_octets_on_hopper if arch == "sm_90a" else few_rows_octets
        octets = 0 if _is_batch_invariant else octets_of_tile(num_rows, inputs, out, num_sms, ring_bytes)
        if octets:
            return _few_rows(octets, x, weight, bias, form)
        if arch == "sm_90a" and (tiling := _tiling(num_rows, inputs, out, form, num_sms)):
            return many_rows(tiling, x, weight, bias, form)
    if num_rows and _is_batch_invariant:
        raise UserError(
            "--batch-invariant knows products in bfloat16 and float16 whose rows are multiples of 16 bytes, "
            f"not of {inputs} inputs and {out} outputs in {str(x.dtype).removeprefix('torch.')}: leave it out"
        )
    if form == "float" and not is_wide:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    y = F.linear(x, weight, bias)
    return gated_activation(y, form) if form in GATED_FORMS else y


def _new_result(x: Tensor, weight: Tensor, form: str) -> Tensor:
    out = len(weight) // 2 if form in GATED_FORMS else len(weight)
    return x.new_empty(len(x), out, dtype=torch.float32 if form == "float" else x.dtype)


# Both kernels read the weight while the one launched last may still run: that one must not be what writes it.


def _few_rows(octets: int, x: Tensor, weight: Tensor, bias: Tensor | None, form: str) -> Tensor:
    (num_rows, inputs), out = x.shape, len(weight)
    y = _new_result(x, weight, form)
    check_rows(x, weight)
    rows = next(n for n in FEW_ROWS_ON_HOPPER if num_rows <= n)
    kernel(x, f"few_rows_{octets}", few_rows_build, x.dtype, rows)(
        (min(kernels.num_sms(x.get_device()), -(-out // (8 * octets))), 1, 1),
        256,
        *(y.data_ptr(), x.data_ptr(), weight.data_ptr(), pointer(bias)),
        *(FORMS.index(form), num_rows, inputs, out),
    )
    return y


def many_rows(tiling: Tiling, x: Tensor, weight: Tensor, bias: Tensor | None, form: str) -> Tensor:
    num_rows, inputs = x.shape
    y = _new_result(x, weight, form)
    check_rows(x, weight)
    kernel(x, f"many_rows_{tiling.groups}x{tiling.parts}", many_rows_build, x.dtype, tiling.rows)(
        (tiling.blocks(num_rows, len(weight), kernels.num_sms(x.get_device())), 1, 1),
        384,
        launcher.tensor_map(weight.data_ptr(), len(weight), inputs, tiling.height // tiling.cluster),
        launcher.tensor_map(x.data_ptr(), num_rows, inputs, tiling.rows),
        *(y.data_ptr(), pointer(bias), FORMS.index(form), num_rows, inputs, y.shape[1]),
        *tiling.arguments(num_rows, inputs, len(weight)),
        cluster=max(tiling.cluster, tiling.split),
    )
    return y
