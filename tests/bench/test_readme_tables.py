"""The README's tables: what the results say, between the markers."""

import json
from pathlib import Path

from bench import readme_tables as tables
from bench import report
from tests.bench.results import make_result, section_marks, updated_readme


def test_the_readme_gets_its_table_between_the_markers(tmp_path: Path):
    report.write(make_result(), tmp_path / "a.json")
    report.write(make_result(model="late", metrics={**make_result().metrics, "valid": False}), tmp_path / "b.json")
    (tmp_path / "parity.json").write_text('{"kind": "parity", "prompts": []}')

    once = updated_readme(tmp_path, f"# Title\n\n{section_marks('results')}\nThe rest.\n")

    assert once.startswith("# Title\n\n")
    assert once.endswith("\n\nThe rest.\n")
    assert "| tiny | 4 x 16/2, 2 concurrent | A CPU (2 cores) |" in once
    assert "vcli bench tiny" in once
    assert "old" not in once
    assert "late" not in once


def speed_row(
    figure: str, value: float, target: float | None, met: bool | None, model: str = "big"
) -> dict[str, object]:
    row = {
        "figure": figure,
        "model": model,
        "dtype": "bfloat16",
        "value": value,
        "unit": "ms",
        "floor": 3.2,
        "peer": 4.85,
    }
    return row | {"target": target, "met": met, "git_revision": "0123456789abc"}


def test_the_readme_shows_speed_beside_floor_peer_and_target_and_what_was_missed(tmp_path: Path):
    rows = [speed_row("a", 3.5, 3.6, True), speed_row("b", 3.71, 3.6, False), speed_row("c", 9.0, None, None, "small")]
    env = {"gpu": "NVIDIA H200", "driver": "580", "torch": "2.11.0", "command": "python -m bench.speed big small"}
    values = {"kind": "speed", "environment": env, "rows": rows, "time": {}, "start": {"big": ["api all"]}}
    (tmp_path / "h200-speed.json").write_text(json.dumps(values))

    once = updated_readme(tmp_path, f"{section_marks('results')}# Speed\n{section_marks('speed')}End\n")

    assert "| big, bfloat16 | measured | unit | floor | vLLM 0.26 | target |  | revision |" in once
    assert "| a | 3.50 | ms | 3.20 | 4.85 | 3.60 | met | 012345678 |" in once
    assert "| b | 3.71 | ms | 3.20 | 4.85 | 3.60 | **missed** | 012345678 |" in once
    assert "| c | 9.00 | ms | 3.20 | 4.85 | - |  | 012345678 |" in once
    assert once.index("| big, bfloat16") < once.index("| b |") < once.index("| small, bfloat16")
    assert "```text\napi all\n```" in once
    assert "NVIDIA H200, driver 580, torch 2.11.0:" in once
    assert "old" not in once
    assert once.endswith(f"{tables.marks('speed')[1]}\nEnd\n")


def test_where_the_time_of_steps_goes_is_one_table_in_the_order_of_batch_64():
    def share(part: str, us: float, floor_us: float | None, *kernels: str) -> dict[str, object]:
        return {"part": part, "us": us, "floor_us": floor_us, "launches": 1.0, "kernels": list(kernels)}

    idle = share("idle", 0.25, None)
    few = [share("o", 6.5, 5.0, "few_rows_4"), share("norm", 3.0, None, "add_rms_norm"), idle]
    many = [share("norm", 8.0, None, "add_rms_norm"), share("o", 7.0, 6.0, "nvjet_TNT", "splitKreduce_kernel"), idle]
    prompt = [share("o", 90.0, 80.0, "nvjet_sm90_coopA_TNT"), share("rounding", 4.0, None, "round_rows")]
    prompt += [share("other", 2.0, None, "vectorized_gather_kernel", "elementwise_kernel"), idle]
    steps = {"prompt of 8,192 tokens": prompt, "decode step, batch 64": many, "decode step, batch 1": few}

    assert tables.time_table(steps).splitlines() == [
        "| part | batch 1: us | floor | batch 64: us | floor | prompt of 8,192: us | floor | kernels |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| norm | 3.00 | - | 8.00 | - | - | - | add_rms_norm |",
        "| o | 6.50 | 5.00 | 7.00 | 6.00 | 90.00 | 80.00 | few_rows_4, cuBLAS |",
        "| rounding | - | - | - | - | 4.00 | - | round_rows |",
        "| other | - | - | - | - | 2.00 | - | torch |",
        "| idle | 0.25 | - | 0.25 | - | 0.25 | - |  |",
        "| all | 9.75 | 5.00 | 15.25 | 6.00 | 96.25 | 80.00 |  |",
    ]


def test_the_readme_shows_kernels_beside_the_ceilings_of_their_gpu(tmp_path: Path):
    row = {"op": "linear", "shape": "8 x 16 to 32", "us": 12.5, "tb_per_s": 3.9, "tflop_per_s": 0.0, "ratio": None}
    rows = [row | {"share": 0.834, "bound": "bytes"}, row | {"share": 0.5, "bound": "flops", "tflop_per_s": 376.0}]
    ceilings = {"read_bytes_per_s": 4.69e12, "copied_bytes_per_s": 4.27e12, "flops_per_s": 752e12}
    env = {"gpu": "NVIDIA H200", "driver": "580", "torch": "2.11.0", "command": "run", "git_revision": "0123456789abc"}
    values = {"kind": "kernels", "ceilings": ceilings, "rows": rows, "environment": env}
    (tmp_path / "h200-kernels.json").write_text(json.dumps(values))

    once = updated_readme(tmp_path, section_marks("results") + section_marks("kernels"))

    assert "| linear | 8 x 16 to 32 | 12.50 | 3.90 | - | 83% of bytes | - |" in once
    assert "| linear | 8 x 16 to 32 | 12.50 | 3.90 | 376.0 | 50% of flops | - |" in once
    assert "revision 012345678. Ceilings: read 4.69 TB/s, copy 4.27 TB/s, bf16 matrix product 752 TFLOP/s." in once
    assert "old" not in once


def test_the_readme_of_this_repository_says_what_its_results_say(tmp_path: Path):
    root = Path(report.__file__).resolve().parents[1]
    readme = tmp_path / "README.md"
    readme.write_text((root / "README.md").read_text(encoding="utf-8"))

    assert not tables.update_readme(root / "bench" / "results", readme)


def test_a_readme_without_markers_is_left_alone(tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n")

    assert report.main([str(tmp_path), str(readme)]) == 1
    assert readme.read_text() == "# Title\n"
