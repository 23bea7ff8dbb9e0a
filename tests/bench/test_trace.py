"""Idle shares and where the time goes, from traces made by hand."""

import gzip
import json
import time
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.trace import Kernel, add_stages, idle_share, read_kernels, read_trace, where_the_time_goes, whole_steps

NORM, QKV, ROTATE, ATTENTION = "add_rms_norm", "nvjet_tst_64x8", "rotate_and_store", "decode"
GATE, ARGMAX = "gated_silu", "argmax"


def one_after_the_other(*names: str, us: float = 2.0) -> list[Kernel]:
    return [Kernel(name, i * us, (i + 1) * us) for i, name in enumerate(names)]


def test_gaps_are_idle():
    assert idle_share([Kernel("a", 0, 4), Kernel("b", 5, 8), Kernel("c", 8, 10)]) == pytest.approx(0.1)


def test_time_in_which_two_kernels_run_counts_once():
    kernels = [Kernel("long", 0, 10), Kernel("inside", 2, 5), Kernel("after its start", 8, 12), Kernel("late", 16, 20)]

    assert idle_share(kernels) == pytest.approx(0.2)


def test_a_kernel_takes_what_it_adds_and_all_adds_up():
    kernels = [Kernel("rms_norm", 0, 10), Kernel("gated_silu", 4, 16), Kernel("argmax", 20, 22)]

    shares = {share.part: share for share in where_the_time_goes(kernels, num_steps=2)}

    assert {part: share.us for part, share in shares.items()} == {
        "norm": 5,
        "activation": 3,
        "sampling": 1,
        "idle": 2,
    }
    assert shares["norm"].launches == 0.5


def test_matrix_products_are_told_apart_by_their_neighbours():
    layer = [NORM, "few_rows_8", ROTATE, ATTENTION, "gemm_64", NORM, "gemm_64", "splitKreduce_kernel", GATE, "gemm_64"]
    step = ["embedding", *layer, *layer, NORM, "gemm_64", ARGMAX]
    floors = {"qkv": 1e-6, "attention": 2e-6, "unknown": 9.0}

    shares = {share.part: share for share in where_the_time_goes(one_after_the_other(*step * 2), 2, floors)}

    launches = {part: share.launches for part, share in shares.items()}
    assert launches == {
        "qkv": 2, "o": 2, "gate_up": 4, "down": 2, "logits": 1, "norm": 5, "rotary and KV write": 2, "attention": 2,
        "activation": 2, "sampling": 1, "other": 1, "idle": 0,
    }  # fmt: skip
    assert shares["gate_up"].kernels == ["gemm_64", "splitKreduce_kernel"]
    assert (shares["qkv"].floor_us, shares["attention"].floor_us, shares["o"].floor_us) == (1.0, 2.0, None)


def test_an_activation_inside_its_product_leaves_the_mlps_two_products_apart():
    layer = [
        NORM,
        "many_rows_2x1",
        ROTATE,
        ATTENTION,
        "few_rows_4",
        NORM,
        "many_rows_2x2",
        "many_rows_1x2",
        "many_rows_1x2",
    ]
    kernels = one_after_the_other(*layer, *layer, NORM, "few_rows_8", "take_best")

    launches = {share.part: share.launches for share in where_the_time_goes(kernels, 1)}

    assert (launches["gate_up"], launches["down"], launches["logits"], launches["sampling"]) == (2, 4, 1, 1)
    assert "activation" not in launches


def launches_of(*names: str) -> dict[str, float]:
    return {share.part: share.launches for share in where_the_time_goes(one_after_the_other(*names), 1)}


def test_the_sums_of_a_split_product_are_part_of_it():
    """Of the MLP's first, too, where no kernel of the activation alone is between the two."""
    product, mlp = ["nvjet_sm90_tst_splitK_TNT", "splitKreduce_kernel"], [NORM, "nvjet_sm90_tst_splitK_TNT"]

    launches = launches_of(
        *(NORM, *product, ROTATE, ATTENTION, *product),
        *(*mlp, "splitKreduce_kernel", "gated_silu_rounded", *product),
        *(*mlp, *product),
        *(NORM, *product, ARGMAX),
    )

    assert launches == {
        "qkv": 2, "o": 2, "gate_up": 3, "down": 4, "logits": 2, "norm": 4, "rotary and KV write": 1, "attention": 1,
        "rounding": 1, "sampling": 1, "idle": 0,
    }  # fmt: skip


def test_rounded_inputs_and_widened_weights_are_parts_of_their_own_and_part_nobody():
    rounded = ["add_rms_norm_rounded", "nvjet_qq", ROTATE, "prefill", "round_rows", "nvjet_qq"]
    rounded += ["add_rms_norm_rounded", "nvjet_qq", "gated_silu_rounded", "nvjet_qq"]
    widened = [NORM, "widen_grouped", "nvjet", ROTATE, "prefill", "widen_grouped", "nvjet"]
    widened += [NORM, "widen_grouped", "nvjet", GATE, "widen_grouped", "nvjet"]
    layer = {"norm": 2, "qkv": 1, "rotary and KV write": 1, "attention": 1, "o": 1, "gate_up": 1, "down": 1, "idle": 0}

    assert launches_of(*rounded, NORM) == layer | {"norm": 3, "rounding": 2}
    assert launches_of(*widened, NORM) == layer | {"norm": 3, "widening": 4, "activation": 1}


def test_decodes_and_prompts_of_one_step_are_one_attention():
    layer = [NORM, "gemm", ROTATE, "decode", "elementwise_kernel", "prefill", "gemm", NORM, "gemm", GATE, "gemm"]

    assert launches_of(*layer, NORM, "gemm", ARGMAX) == {
        "norm": 3, "qkv": 1, "rotary and KV write": 1, "attention": 2, "other": 1, "o": 1, "gate_up": 1,
        "activation": 1, "down": 1, "logits": 1, "sampling": 1, "idle": 0,
    }  # fmt: skip


def test_a_trace_is_cut_to_whole_steps():
    kernels = one_after_the_other("gemm", ARGMAX, NORM, "gemm", ARGMAX, NORM, "gemm", ARGMAX, NORM)

    cut, num_steps = whole_steps(kernels)

    assert num_steps == 2
    assert cut == kernels[2:8]


def test_kernels_come_out_of_a_chrome_trace_in_their_order(tmp_path: Path):
    events = [
        {"cat": "kernel", "name": "void at::native::reduce_kernel<512, 1, ArgMaxOps<float>>(int)", "ts": 30, "dur": 5},
        {"cat": "kernel", "name": "void cublasLt::splitKreduce_kernel<32, 16>(float*)", "ts": 10, "dur": 2.5},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 0, "dur": 1},
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 1, "dur": 3},
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))

    kernels = [Kernel("splitKreduce_kernel", 10.0, 12.5), Kernel("argmax", 30.0, 35.0)]
    assert read_kernels(path) == kernels
    assert read_kernels(path, with_copies=True) == [Kernel("copy", 0.0, 1.0), *kernels]


def test_copies_and_small_kernels_are_parts_of_their_own_and_part_nobody():
    """Such as those that pick the tokens of a prompt that go on after the last layer's attention."""
    kernels = one_after_the_other("copy", NORM, "gemm", "copy", ROTATE, ATTENTION, "copy", "index_select", "gemm", NORM)

    launches = {share.part: share.launches for share in where_the_time_goes(kernels, 1)}

    assert launches == {
        "copy": 3, "norm": 2, "qkv": 1, "rotary and KV write": 1, "attention": 1, "o": 1, "other": 1, "idle": 0,
    }  # fmt: skip


def test_stages_lie_on_the_time_line_of_torchs_own_trace(tmp_path: Path):
    path = tmp_path / "trace.json.gz"
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.monotonic()
        time.sleep(0.02)
        with record_function("inside"):
            torch.ones(10).sum()
        time.sleep(0.02)
        end = time.monotonic()
    profiler.export_chrome_trace(str(path))

    add_stages([("forward", start, end)], path)

    spans = {event.get("name"): event for event in read_trace(path)["traceEvents"] if "dur" in event}
    inside, stage = spans["inside"], spans["forward"]
    assert stage["dur"] == pytest.approx((end - start) * 1e6)
    assert stage["ts"] < inside["ts"] < inside["ts"] + inside["dur"] < stage["ts"] + stage["dur"]
