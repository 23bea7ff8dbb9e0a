"""What is said of a profile, from profiles made by hand."""

from dataclasses import replace

import pytest

from bench.advice import Advice, Check, advise
from bench.config import ProfileConfig
from bench.profile import GLUE, IDLE, Part, Profile
from bench.profile_report import Report, sentences
from engine.config import EngineConfig
from tests.bench.profiles import STEP, make_profile, part


def first(profile: Profile) -> Advice:
    return advise(profile)[0]


def test_weights_that_are_read_for_few_rows_are_to_be_fewer_bytes():
    advice = first(make_profile(part("gate_up", 0.5), part("down", 0.2), part("attention", 0.15)))

    assert advice.changes == {"quantization": "fp8"}
    assert "reading the layers' weights" in advice.bottleneck
    assert "gate_up 50%, down 20%" in advice.evidence
    assert "80% of what the device was seen to reach" in advice.evidence


def test_products_far_from_their_ceiling_are_not_said_to_read_too_much():
    advice = first(make_profile(part("gate_up", 0.7, reached=0.3)))

    assert advice.bottleneck == "the layers' matrix products, which do not reach what the device could do"
    assert "30% of what the device was seen to reach" in advice.evidence


def test_on_a_cpu_more_requests_share_the_weights():
    advice = first(make_profile(part("gate_up", 0.7), device="cpu", options=ProfileConfig(concurrency=8)))

    assert (advice.changes, advice.load) == ({}, {"concurrency": 32})


def test_what_is_quantized_already_is_not_quantized_again():
    found = advise(make_profile(part("gate_up", 0.7), is_quantized=True))

    assert all("quantization" not in advice.changes for advice in found)


def test_products_of_prompts_want_a_higher_rate():
    advice = first(make_profile(part("gate_up", 0.6, bound="flops"), part("attention", 0.15, bound="flops")))

    assert advice.bottleneck == "the layers' matrix products"
    assert "twice the rate" in advice.remedy


def test_long_contexts_want_smaller_keys_and_values():
    advice = first(make_profile(part("attention", 0.6), part("gate_up", 0.2)))

    assert advice.changes == {"kv_cache_dtype": "fp8"}


def test_a_gpu_that_waits_for_launches_wants_graphs():
    parts = part("gate_up", 0.3), Part(IDLE, 6000, 0.6, 0)

    assert first(make_profile(*parts, engine=EngineConfig(enforce_eager=True))).changes == {"enforce_eager": False}
    without = first(make_profile(*parts))
    assert without.bottleneck == "the host, for which the GPU waits"
    assert not without.changes
    assert "`forward`" in without.evidence


def test_preemptions_want_more_cache():
    steps = [replace(STEP, num_finished_prompt_tokens=100, num_preemptions=n, kv_usage=0.99) for n in range(9)]

    gpu, cpu = (first(make_profile(part("gate_up", 0.3), device=name, steps=steps)) for name in ("cuda:0", "cpu"))

    assert gpu.changes == {"kv_cache_dtype": "fp8"}
    assert cpu.changes == {"kv_cache_memory": 2 << 30}
    assert cpu.evidence.startswith("8 times a request gave its blocks up")
    assert "99% full" in cpu.evidence


def test_a_full_cache_is_told_once_and_no_more_requests_are_asked_for():
    steps = [replace(STEP, num_waiting=32, num_preemptions=n, kv_usage=0.99) for n in range(9)]

    found = advise(make_profile(part("gate_up", 0.7), device="cpu", steps=steps, options=ProfileConfig(concurrency=8)))

    assert [advice.changes for advice in found] == [{"kv_cache_memory": 2 << 30}, {}]
    assert not any(advice.load for advice in found)


def test_a_queue_before_a_full_batch_wants_more_rows():
    steps = [replace(STEP, num_running=16, num_waiting=48)] * 4

    advice = first(make_profile(part("gate_up", 0.3), steps=steps, max_num_seqs=16))

    assert advice.changes == {"max_num_seqs": 64}
    assert advice.evidence == "48 requests wait beside 16 that run, in the mean"


def test_a_kernel_far_from_every_ceiling_is_named_and_no_flag_is():
    found = advise(make_profile(part("attention", 0.19, reached=0.2), part("gate_up", 0.05)))

    [advice] = found
    assert "`attention`, which does not reach" in advice.bottleneck
    assert "at 20% of the ceiling" in advice.evidence
    assert not advice.changes
    assert not advice.remedy


def test_attention_far_from_its_ceiling_is_told_once():
    [advice] = advise(make_profile(part("attention", 0.6, bound="flops", reached=0.2), part("gate_up", 0.05)))

    assert "`attention`, which does not reach" in advice.bottleneck


def test_time_between_the_ops_is_told():
    profile = make_profile(Part(GLUE, 4000, 0.4, 0), part("gate_up", 0.05), device="cpu")
    profile.run.stage_seconds |= {"forward": 0.8, "sample": 0.1, "schedule": 0.1, "wait": 0.0}

    # Of the model's own stages, forward and sample, nothing is counted but what lies between the ops.
    assert first(profile).evidence == "50%: 40% between the ops, and 10% in `schedule`"


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (150.0, "100 → 150 tok/s (+50%): it helps"),
        (98.0, "no difference that could be told"),
        (60.0, "(-40%): it does not help here"),
    ],
)
def test_what_came_of_an_advice_is_told_as_it_is(after: float, verdict: str):
    report = Report.of(make_profile(part("gate_up", 0.7)))
    tried = replace(report, checked=report.first_to_try, check=Check(100.0, after))

    said = sentences(tried)

    assert said[0].startswith("The bottleneck is reading the layers' weights: 70% of the time")
    assert said[1].startswith("  Try --quantization fp8")
    assert said[2].startswith("  Tried: ")
    assert verdict in said[2]


def test_where_nothing_stands_out_it_is_said():
    assert sentences(Report.of(make_profile(part("norm", 0.05)))) == [
        "Nothing stands out: every part is near what the device can do."
    ]


def test_a_busy_machine_is_told():
    profile = make_profile(part("norm", 0.05), device="cpu", environment={"load_average": 7.5, "cpu_count": 2})

    assert sentences(Report.of(profile))[-1].startswith("This machine has other things to do (load average 7.5 on 2")
