"""The gate: against fake servers, and its files. (tests/bench/test_gate_on_tape.py plays it on recorded noise.)"""

import contextlib
import itertools
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import gate_report
from bench.config import GateConfig
from bench.engines import Engine, Trial, at_url, recording
from bench.environment import environment
from bench.gate import Gate, run_gate
from bench.limits import Limit, Verdict, read_limits
from bench.load import Load
from bench.result import BenchResult
from bench.workloads import random_requests
from engine.config import EngineConfig
from engine.errors import UserError

LIMITS = read_limits(["throughput>=-5%", "p50_itl<=+5%"])
REQUESTS = random_requests(4, input_len=16, output_len=5, vocab_size=1000, seed=0)


def slowed(server, gap_s: float) -> Engine:
    """The fake server, which takes so long for a token whenever this engine is asked."""

    @contextlib.contextmanager
    def start(show: Any) -> Any:
        with at_url(server.url).start(show) as run_trial:

            def run_slowly(requests: Any, load: Load) -> Trial:
                server.gap_s = gap_s
                return run_trial(requests, load)

            yield run_slowly

    return Engine(f"{gap_s * 1e3:g} ms a token", start)


def test_a_server_that_became_slower_is_found_with_the_right_change(fake_server):
    before, after = slowed(fake_server, 0.02), slowed(fake_server, 0.04)
    gate = Gate(before, after, read_limits(["p50_itl<=+30%"]), budget_s=200)
    gate.run(lambda index: REQUESTS, Load(concurrency=4))

    (found,) = gate.findings()
    assert gate.verdict is Verdict.REGRESSED
    assert found["verdict"] == "regressed"
    assert found["measured"] == pytest.approx(1.0, abs=0.25)
    assert {pair.start for pair in gate.pairs} == {0, 1}  # it was seen twice
    assert len({pair.is_after_first for pair in gate.pairs}) == 2


def test_a_regression_that_fresh_engines_do_not_show_is_none():
    starts = iter([40.0, 20.0])

    def unlucky_once(show: Any) -> Any:
        trial = Trial({"p50_itl_ms": next(starts)})
        return contextlib.nullcontext(lambda requests, load: trial)

    steady = recording("steady", [{"p50_itl_ms": 20.0}] * 50)
    gate = Gate(steady, Engine("unlucky", unlucky_once), read_limits(["p50_itl<=+30%"]), 100)
    gate.run(lambda index: [], Load(concurrency=1))

    assert gate.verdict is Verdict.FINE
    assert {pair.start for pair in gate.pairs} == {0, 1}


def test_an_alarm_that_there_is_no_time_to_hear_again_starts_nothing_anew(monkeypatch: pytest.MonkeyPatch):
    starts: list[str] = []

    def slow(show: Any) -> Any:
        starts.append("slow")
        return contextlib.nullcontext(lambda requests, load: Trial({"output_throughput": 80.0}))

    def run(budget_s: float) -> Gate:
        clock = itertools.count()  # is looked at once in the beginning, and twice a pair
        monkeypatch.setattr("bench.gate.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
        steady = recording("steady", [{"output_throughput": 100.0}] * 50)
        gate = Gate(steady, Engine("slow", slow), read_limits(["throughput>=-5%"]), budget_s)
        gate.run(lambda index: [], Load(concurrency=1))
        return gate

    num_until_alarm = sum(pair.start == 0 for pair in run(1000).pairs)
    starts.clear()
    gate = run(2 * num_until_alarm)

    assert (gate.verdict, len(gate.pairs)) == (Verdict.UNDECIDED, num_until_alarm)
    assert gate.reason.endswith("is spent")
    assert gate.findings()[0]["verdict"] == "undecided"
    assert starts == ["slow"]


def test_failed_requests_end_the_gate(fake_server):
    fake_server.fail, fake_server.fail_every = "break", 7

    gate = Gate(at_url(fake_server.url), at_url(fake_server.url), LIMITS, budget_s=100)

    with pytest.raises(UserError, match=r"failed: the stream broke off before \[DONE\]"):
        gate.run(lambda index: REQUESTS, Load(concurrency=4))


def test_trials_in_which_the_client_was_too_slow_do_not_count():
    good, bad = {"failed": 0, "output_throughput": 10.0}, {"failed": 0, "output_throughput": 1.0, "valid": False}
    gate = Gate(recording("a", [good] * 40), recording("b", [good, bad] * 20), read_limits(["throughput>=-5%"]), 100)

    gate.run(lambda index: [], Load(concurrency=1))

    assert gate.verdict is Verdict.FINE
    assert gate.findings()[0]["measured"] == 0
    assert gate.num_invalid >= 5


def test_a_recording_that_is_too_short_leaves_it_undecided():
    trials = [{"output_throughput": 10.0}] * 3
    gate = Gate(recording("a", trials), recording("b", trials), read_limits(["throughput>=-5%"]), 100)

    gate.run(lambda index: [], Load(concurrency=1))

    assert gate.verdict is Verdict.UNDECIDED
    assert gate.reason.startswith("all 3 recorded trials are used")


def test_a_gate_writes_the_next_baseline_which_holds_on_the_same_machine_alone(fake_server, tmp_path: Path):
    fake_server.first_token_s = fake_server.gap_s = 0.02
    file, here = tmp_path / "first.json", GateConfig(url=fake_server.url, metric=("p50_ttft<=+300%",))
    load = replace(here, concurrency=2, input_len=8, output_len=4)
    first = run_gate(EngineConfig(), replace(load, against=fake_server.url), lambda config: [])
    gate_report.write(replace(first, trials=(first.trials or []) * 5), file)  # enough, even if some do not count

    again = run_gate(EngineConfig(), replace(here, baseline=file, against="recorded"), lambda config: [])

    assert (first.metrics["verdict"], again.metrics["verdict"]) == ("fine", "fine")
    assert again.workload == first.workload
    gate_report.write(replace(first, environment={**environment(), "cpu": "Another CPU"}), file)
    with pytest.raises(UserError, match="was measured with cpu Another CPU, here it is"):
        run_gate(EngineConfig(), replace(here, baseline=file, against="recorded"), lambda config: [])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "--baseline FILE or --against REV"),
        ({"against": "no-such-branch"}, "'no-such-branch' is no revision of"),
        ({"against": "recorded"}, "needs the trials of a gate"),
        ({"against": "HEAD", "metric": ("p99_itl",)}, "must read like p99_itl<=\\+5%"),
        ({"against": "HEAD", "metric": ("p98_itl<=+5%",)}, "no figure is called p98_itl; there are throughput, "),
        ({"against": "HEAD", "metric": ("throughput>=-100%",)}, "nothing can change by -100 %"),
        ({"against": "HEAD", "metric": ("nowhere.toml",)}, "nowhere.toml: needs a table"),
    ],
)
def test_a_gate_that_cannot_be_is_one_sentence(options: dict[str, Any], words: str, default_model):
    with pytest.raises(UserError, match=words):
        run_gate(EngineConfig(), GateConfig(**options), lambda config: [])


def test_a_run_of_another_kind_is_no_baseline(tmp_path: Path):
    file = tmp_path / "offline.json"
    file.write_text(BenchResult(kind="throughput").to_json())

    with pytest.raises(UserError, match="of kind 'throughput'; a gate repeats a run against a server"):
        run_gate(EngineConfig(), GateConfig(baseline=file), lambda config: [])


def test_a_baseline_is_repeated_with_its_prefixes_and_turns(tmp_path: Path, fake_server):
    fake_server.first_token_s = fake_server.gap_s = 0.01
    file = tmp_path / "run.json"
    load = {"concurrency": 2, "input_len": 8, "output_len": 3, "prefix_len": 16, "num_prefixes": 2, "turns": 2}
    file.write_text(BenchResult("serving", "fake", {"dataset": "random", **load}).to_json())
    options = GateConfig(baseline=file, url=fake_server.url, against=fake_server.url, metric=("throughput>=-90%",))

    result = run_gate(EngineConfig(), options, lambda config: [])

    assert {name: result.workload[name] for name in load} == load
    assert result.model == "fake"


def test_a_baseline_of_another_model_is_not_taken_for_one_of_this(tmp_path: Path, default_model):
    file = tmp_path / "run.json"
    file.write_text(BenchResult("serving", "llama-3.1-8b", {"concurrency": 2}).to_json())

    with pytest.raises(UserError, match=r"was of llama-3.1-8b, and this is SmolLM2.*: give that MODEL"):
        run_gate(EngineConfig(), GateConfig(baseline=file, against="HEAD"), lambda config: [])


def test_limits_are_read_from_a_file_too(tmp_path: Path):
    file = tmp_path / "limits.toml"
    file.write_text('[metrics]\nthroughput = ">=-3%"\np99_itl = "<= +5%"\n')

    assert read_limits([str(file), "p99_itl<=+5%"]) == [Limit.parse("throughput>=-3%"), Limit.parse("p99_itl<=+5%")]


def test_more_is_worse_or_better_as_the_limit_says():
    slower = {"output_throughput": 80.0, "p99_itl_ms": 12.5}, {"output_throughput": 100.0, "p99_itl_ms": 10.0}
    for limit in read_limits(["throughput>=-5%", "p99_itl<=+5%"]):
        assert limit.log_ratio(slower[1], slower[0]) == pytest.approx(0.2231, abs=1e-4)
    assert read_limits(["throughput>=-5%"])[0].median_change([0.2231]) == pytest.approx(-0.2, abs=1e-4)
    assert read_limits(["p99_itl<=+5%"])[0].median_change([0.2231]) == pytest.approx(0.25, abs=1e-4)


def result_of(gate: Gate) -> BenchResult:
    figures = {"verdict": gate.verdict.value, "reason": gate.reason, "before": "main", "after": "this code"}
    figures |= {"num_pairs": len(gate.pairs), "num_starts": 2, "num_invalid": 1, "limits": gate.findings()}
    workload = {"dataset": "random", "num_prompts": 4, "input_len": 8, "output_len": 4, "concurrency": 2}
    return BenchResult("gate", "tiny", workload, figures, {"cpu": "Fine CPU", "cpu_count": 2, "gpu": None})


def test_the_files_say_what_was_found():
    slow = {"output_throughput": 80.0, "p50_itl_ms": 10.0}
    fast = {"output_throughput": 100.0, "p50_itl_ms": 10.0}
    gate = Gate(recording("main", [fast] * 60), recording("now", [slow] * 60), LIMITS, 100)
    gate.run(lambda index: [], Load(concurrency=1))

    result = result_of(gate)
    suite = ET.fromstring(gate_report.to_junit(result))
    page = gate_report.to_markdown(result)

    assert [suite.get(name) for name in ("tests", "failures", "errors")] == ["2", "1", "0"]
    assert [(case.get("name"), [child.tag for child in case]) for case in suite] == [
        ("throughput>=-5%", ["failure"]),
        ("p50_itl<=+5%", []),
    ]
    assert "| throughput>=-5% | -20.0% |" in page
    assert "**regressed (" in page
    assert "1 more left out, the client was too slow in them" in page
