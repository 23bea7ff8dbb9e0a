"""Results as tables and files."""

import io
import json
from pathlib import Path

import pandas as pd
import pytest

from bench import output, report
from bench.result import BenchResult
from engine.errors import UserError
from tests.bench.results import make_result, make_samples, make_sweep


def test_json_comes_back_as_it_was(tmp_path: Path):
    result = make_result(num_failed=1, floor={"device": "H200", "run_s": 1.0}, baseline={"ratio": 2.0})

    report.write(result, tmp_path / "result.json")

    assert BenchResult.read(tmp_path / "result.json") == result


def test_the_json_has_the_fields_own_names_at_the_top(tmp_path: Path):
    values = json.loads(make_result().to_json())

    names = ("p99_ttft_ms", "p50_tpot_ms", "p95_itl_ms", "p99_e2el_ms", "mean_ttft_ms", "median_itl_ms", "std_tpot_ms")
    assert all(isinstance(values[name], float) for name in names)
    assert (values["completed"], values["failed"]) == (4, 0)
    assert {"duration", "request_throughput", "output_throughput", "total_token_throughput"} <= set(values)
    assert {"environment", "definitions", "workload"} <= set(values)


def test_csv_is_one_line_with_the_same_figures():
    result = make_result()

    frame = pd.read_csv(io.StringIO(report.to_csv(result)))

    assert len(frame) == 1
    assert frame["p99_ttft_ms"][0] == pytest.approx(result.metrics["p99_ttft_ms"])
    assert frame["workload.concurrency"][0] == 2
    assert frame["environment.command"][0] == "vcli bench tiny"


@pytest.mark.parametrize("ending", [".json", ".csv", ".md", ".html", ".svg"])
def test_every_format_writes_a_file_that_names_the_model(tmp_path: Path, ending: str):
    path = tmp_path / "new" / f"result.v2{ending}"

    report.write(make_result(num_failed=1, samples=make_samples()), path)

    assert "tiny" in path.read_text()


def test_a_csv_of_requests_has_a_line_for_each_of_every_run(tmp_path: Path):
    sweep = make_sweep()
    for run in sweep.runs:
        run.samples = make_samples()

    report.write(sweep, tmp_path / "sweep.requests.csv")
    frame = pd.read_csv(tmp_path / "sweep.requests.csv")

    assert list(frame["concurrency"]) == [1, 1, 1, 16, 16, 16]
    assert frame["ttft"][1] == 0.3
    assert frame["error"][5] == "HTTP 500: oh"
    with pytest.raises(UserError, match="no samples"):
        report.to_requests_csv(make_result())


def test_a_result_in_json_becomes_any_other_file(tmp_path: Path):
    report.write(make_result(samples=make_samples()), tmp_path / "run.json")

    assert report.main([str(tmp_path / "run.json"), str(tmp_path / "run.png")]) == 0

    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_results_of_other_kinds_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report.write(make_result(kind="gate"), tmp_path / "gate.json")

    assert report.main([str(tmp_path / "gate.json"), str(tmp_path / "gate.html")]) == 1
    assert "gate.json is of the kind gate: only serving" in capsys.readouterr().err


def test_a_comparison_of_checkpoints_becomes_its_page(tmp_path: Path):
    stored = Path(report.__file__).parent / "results" / "cpu-quality-int4.json"

    assert report.main([str(stored), str(tmp_path / "quality.html")]) == 0
    assert (tmp_path / "quality.html").read_text().startswith("<!doctype html>")


def test_a_sweep_is_a_row_each_run_in_every_form(tmp_path: Path):
    sweep = make_sweep()
    report.write(sweep, tmp_path / "sweep.json")

    columns, rows = report.sweep_table(sweep)

    assert [row[0] for row in rows] == [1, 16]
    assert [row[-1] for row in rows] == ["", "not valid"]
    assert rows[0][columns.index("TTFT p50 ms")] == pytest.approx(500)
    assert not sweep.is_valid
    assert BenchResult.read(tmp_path / "sweep.json") == sweep
    assert list(pd.read_csv(io.StringIO(report.to_csv(sweep)))["workload.concurrency"]) == [1, 16]
    assert report.to_markdown(sweep).count("\n| 1") == 2


def test_samples_go_to_the_file_one_list_a_line_and_not_to_the_screen(tmp_path: Path):
    run = make_sweep().runs[0]

    report.write(run, tmp_path / "run.json")

    assert '    "gaps": [0.1, 0.1, 0.1]' in (tmp_path / "run.json").read_text()
    assert BenchResult.read(tmp_path / "run.json").samples == run.samples
    assert "samples" not in json.loads(run.to_json())


def test_an_unknown_extension_is_refused_with_the_known_ones(tmp_path: Path):
    with pytest.raises(UserError, match=r"\.json, \.csv, \.requests\.csv, \.md, \.html, \.svg, \.png"):
        output.check(tmp_path / "result.xls", report.FORMATS)


def test_failures_add_the_adjusted_percentile_to_the_table():
    without, _ = report.latency_table(make_result())
    columns, rows = report.latency_table(make_result(num_failed=1))

    assert without == ["ms", "mean", "p50", "p95", "p99"]
    assert columns[-3:] == ["adj_p50", "adj_p95", "adj_p99"]
    assert [row[0] for row in rows] == ["TTFT", "TPOT", "ITL", "E2EL"]
    assert rows[0][-1] is None


def test_floor_and_baseline_stand_beside_the_figures():
    floor = {"device": "H200", "run_s": 1.8, "decode_step_ms": 4.2, "prefill_ms": 9.5}
    baseline = {"engine": "transformers 5", "batch_size": 2, "output_throughput": 1.5, "ratio": 1.4}

    _, rows = report.figure_table(make_result(floor=floor, baseline=baseline))

    shown = {label: value for label, value, _ in rows}
    assert shown["floor / duration"] == pytest.approx(1.8 / 3.7 * 100)
    assert shown["output throughput / baseline"] == 1.4


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": [1]}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, text: str):
    (tmp_path / "x.json").write_text(text)

    with pytest.raises(UserError, match=r"x\.json is not a result"):
        BenchResult.read(tmp_path / "x.json")
