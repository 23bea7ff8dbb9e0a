"""The speed script's own logic: its table, its floors by hand, its file, and a tiny model through all of it."""

import json
import re
import weakref
from pathlib import Path

import pytest

from bench import figures, kernels, speed, trace
from bench.figures import GOALS, Decode, Goal, Prompt, Run, Serving
from bench.floor import H200, Floor
from bench.modes import ModeParity
from bench.speed import ModelBench, Results, Row
from bench.trace import WARM_UP_STEPS, Kernel, Share
from bench.workloads import random_requests
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.model_config import ModelConfig

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
QWEN_06B = LLAMA_8B | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
# By hand, from the parameters (7.505 and 0.596 G), the KV of a token (131,072 and 114,688 B) and the two ceilings.
FLOORS = {
    "decode step, batch 1": (3.21, 0.260),
    "decode step, batch 8": (3.33, 0.367),
    "decode step, batch 32": (3.72, 0.705),
    "decode step, batch 64": (4.23, 1.156),
    "decode step, batch 128": (5.26, 2.06),
    "decode step, batch 256": (9.23, 4.01),
    "decode step, batch 64, fp8 KV cache": (3.72, 0.705),
    "prompt of 512 tokens": (9.6, 0.64),
    "prompt of 2,048 tokens": (39.1, 3.0),
    "prompt of 8,192 tokens": (175.4, 20.0),
    "prompt of 512 tokens again": (3.21, 0.267),
    "prompt of 2,048 tokens again": (3.26, 0.304),
    "prompt of 8,192 tokens again": (3.43, 0.454),
    "512 x (1,024/128)": (13.2, 2.54),
    "256 x (100-1,024/100-1,024)": (9.8, 3.44),
    "1,024 x (100-1,024/100-1,024)": (39.0, 14.9),
    "serving one client: TTFT p50": (9.6, 0.64),
    "serving one client: TPOT p50": (3.22, 0.268),
    "serving 320 x (512/128), 64 at a time": (5.78, 0.95),
    "serving 768 x (512/128), 256 at a time": (10.8, 2.0),
}


@pytest.mark.parametrize("name", FLOORS)
@pytest.mark.parametrize("config", [LLAMA_8B, QWEN_06B], ids=["8B", "0.6B"])
def test_floors_are_the_ones_worked_out_by_hand(tmp_path: Path, name: str, config: dict[str, object]):
    (tmp_path / "config.json").write_text(json.dumps(config))
    floor = Floor(ModelConfig.from_path(tmp_path), "bfloat16", H200, "fp8" if "fp8" in name else "auto")
    figure = next(figure for figure in figures.all_figures() if figure.name == name)

    assert figure.floor(floor) == pytest.approx(FLOORS[name][config is QWEN_06B], rel=0.02)


def test_every_figure_has_a_floor_or_none_can_be_given():
    without = {figure.name for figure in figures.all_figures() if figure.floor_s is None}

    assert without | set(FLOORS) == {figure.name for figure in figures.all_figures()}
    assert not without & set(FLOORS)


@pytest.mark.parametrize("model", GOALS)
def test_every_goal_is_of_a_figure_that_is_measured(model: str):
    assert set(GOALS[model]) <= {figure.name for figure in figures.all_figures()}


def test_every_roofline_is_a_case_of_the_kernel_timings_with_its_target_by_hand():
    cases = {(case.op, case.shape): case for case in kernels.cases()}
    targets = {}
    for roofline in figures.ROOFLINES:
        work = getattr(cases[roofline.op, roofline.shape], roofline.counts)
        targets[roofline.op] = roofline.floor_us(work), roofline.goal(work).target

    # 64 x 4,096 tokens of 8 heads of 128 numbers, keys and values, at 4.69 TB/s, and 85 % of that.
    assert targets["decode"] == pytest.approx((229.0, 269.4), rel=0.01)
    # 4 x 4,096 x 8,192 ** 2 / 2 FLOPs at 752 TFLOP/s, and at 540.
    assert targets["prefill"] == pytest.approx((731.0, 1018.0), rel=0.01)
    # 4 x 8,192 x 4,096 numbers of 2 bytes at 4.27 TB/s.
    assert targets["add_rms_norm"] == pytest.approx((62.9, 74.0), rel=0.01)


def test_a_model_nobody_has_goals_for_is_measured_all_the_same():
    goals = figures.goals_of("another", "NVIDIA H200")

    assert set(goals) == {figure.name for figure in figures.all_figures()}
    assert set(goals.values()) == {Goal()}


def test_weights_rounded_at_load_are_a_model_of_their_own(tmp_path: Path):
    results = Results(tmp_path / "h200-quant.json", {"gpu": "NVIDIA H200"})
    bench = ModelBench(EngineConfig(model="models/llama-3.1-8b", quantization="fp8"), results, re.compile("batch 64$"))

    assert bench.name == "llama-3.1-8b-fp8"
    assert bench.goals["decode step, batch 64"] == Goal(5.11, 3.5)


def test_another_gpu_is_not_compared_with_figures_of_an_h200():
    goals = figures.goals_of("llama-3.1-8b", "NVIDIA H100 80GB HBM3")

    assert set(goals) == set(GOALS["llama-3.1-8b"])
    assert set(goals.values()) == {Goal()}
    assert figures.goals_of("llama-3.1-8b", "NVIDIA H200") == GOALS["llama-3.1-8b"]


def test_rows_of_another_run_stay_and_those_measured_again_take_their_place(tmp_path: Path):
    path = tmp_path / "new" / "h200-speed.json"
    first = Results(path, {"gpu": "NVIDIA H200", "git_revision": "old", "date": "then"})
    for figure, model in (("a", "big"), ("b", "big"), ("a", "small")):
        first.add(Row(figure, model, "bfloat16", 1.0, "ms"))

    second = Results(path, {"gpu": "NVIDIA H200", "git_revision": "new", "date": "now"})
    second.add(Row("a", "big", "bfloat16", 2.0, "ms", target=1.5, met=False))
    second.add(Row("c", "big", "bfloat16", 3.0, "ms"))

    written = json.loads(path.read_text())
    rows = [(r["figure"], r["model"], r["value"], r["git_revision"]) for r in written["rows"]]
    assert rows == [
        ("a", "big", 2.0, "new"),
        ("b", "big", 1.0, "old"),
        ("a", "small", 1.0, "old"),
        ("c", "big", 3.0, "new"),
    ]
    assert written["kind"] == "speed"
    assert written["rows"][0]["met"] is False
    assert written["environment"]["git_revision"] == "new"


@pytest.mark.parametrize(("gpu", "name"), [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3")])
def test_the_file_is_called_after_the_gpu(gpu: str, name: str):
    assert speed.default_output(gpu).name == f"{name}-speed.json"


def make_bench(path: Path, output: Path, only: str = "", gpu: str | None = None) -> ModelBench:
    engine = EngineConfig(
        model=str(path),
        load_format="dummy",
        device="cpu",
        skip_tokenizer_init=True,
        max_num_seqs=8,
        kv_cache_memory=1 << 24,
    )
    arguments = ["--device", "cpu", "--max-num-seqs", "8", "--kv-cache-memory", "16MiB"]
    return ModelBench(
        engine, Results(output, {"gpu": gpu, "git_revision": "r", "date": "d"}), re.compile(only), None, arguments
    )


def test_a_tiny_model_is_measured_on_an_engine(tiny_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tiny_checkpoint("llama", max_position_embeddings=2048)
    monkeypatch.setattr(figures, "DECODES", (Decode(4, 24, 6), Decode(2, 16, 3)))
    monkeypatch.setattr(figures, "PROMPTS", (Prompt(1024),))
    monkeypatch.setattr(
        figures,
        "RUNS",
        (few := Run("few", lambda size: random_requests(5, input_len=20, output_len=4, vocab_size=size, seed=0)),),
    )
    bench = make_bench(path, tmp_path / "speed.json", "decode step, batch [24]$|^prompt|few")

    bench.measure_engine()

    rows = bench.results.values["rows"]
    assert [row["figure"] for row in rows] == [
        "decode step, batch 4",
        "decode step, batch 2",
        "prompt of 1,024 tokens",
        "prompt of 1,024 tokens again",
        few.title,
    ]
    assert all(row["value"] > 0 and row["dtype"] == "float32" and row["met"] is None for row in rows)
    assert rows[3]["value"] < rows[2]["value"]


@pytest.fixture
def traced_batches(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """The traced steps: the first position and the number of tokens of each request. Small ones, on no GPU."""
    steps: list[list[tuple[int, int]]] = []

    def record(core: EngineCore, num_steps: int, path: Path | None) -> list[Kernel]:
        for index in range(WARM_UP_STEPS + num_steps):
            core.step()
            if index >= WARM_UP_STEPS:
                steps.append([(request.start, request.num_tokens) for request in core.batch.requests])
        names = [name for _ in range(num_steps) for name in ("rms_norm", "rotate", "decode", "gemm", "argmax")]
        return [Kernel(name, 2.0 * i, 2.0 * i + 1) for i, name in enumerate(names)]

    monkeypatch.setattr(trace, "record", record)
    monkeypatch.setattr(figures, "PROMPTS", (Prompt(1024),))
    monkeypatch.setattr(figures, "DECODES", (Decode(1, 16, 40), Decode(2, 24, 30), Decode(4, 24, 3)))
    for name, value in {
        "TRACED": Decode(2, 24, 30),
        "ALSO_TRACED": (Decode(1, 16, 40),),
        "TRACED_STEPS": 3,
        "TRACED_PROMPT": Prompt(1024),  # as many tokens as a step has on a CPU
        "TRACED_PROMPTS": 2,
    }.items():
        monkeypatch.setattr(speed, name, value)
    return steps


def test_where_the_time_goes_is_traced_of_steps_that_decode_and_of_fresh_prompts(
    tiny_checkpoint, tmp_path: Path, traced_batches: list[list[tuple[int, int]]]
):
    only = "^decode step, batch 1$|idle|^prompt of 1,024 tokens$"
    path = tiny_checkpoint("llama", max_position_embeddings=2048)
    bench = make_bench(path, tmp_path / "speed.json", only, "NVIDIA H200")

    bench.measure_engine()

    assert [row["figure"] for row in bench.results.values["rows"]] == [
        "decode step, batch 1",
        figures.IDLE.name,
        "prompt of 1,024 tokens",
    ]
    two, one, prompts = traced_batches[:4], traced_batches[4:8], traced_batches[8:]
    assert two == [[(24 + step, 1)] * 2 for step in range(WARM_UP_STEPS - 1, WARM_UP_STEPS + 3)]
    assert one == [[(16 + step, 1)] for step in range(WARM_UP_STEPS - 1, WARM_UP_STEPS + 3)]
    assert prompts == [[(0, 1024)]] * 3
    (steps,) = json.loads(bench.results.path.read_text())["time"].values()
    assert list(steps) == ["decode step, batch 2", "decode step, batch 1", "prompt of 1,024 tokens"]
    floor = Floor(ModelConfig.from_path(path), "float32", H200)
    floors = [next(share["floor_us"] for share in step if share["part"] == "attention") for step in steps.values()]
    parts = floor.decode_parts_s(2, 27), floor.decode_parts_s(1, 19), floor.prefill_parts_s(1024)
    assert floors == [own["attention"] * 1e6 for own in parts]


def test_no_step_is_traced_whose_figure_nobody_asks_for(
    tiny_checkpoint, tmp_path: Path, traced_batches: list[list[tuple[int, int]]]
):
    path = tiny_checkpoint("llama", max_position_embeddings=2048)
    bench = make_bench(path, tmp_path / "speed.json", "^decode step, batch 4$")

    bench.measure_engine()

    assert [row["figure"] for row in bench.results.values["rows"]] == ["decode step, batch 4"]
    assert (traced_batches, bench.results.values["time"]) == ([], {})


def test_where_the_time_goes_stays_of_steps_that_another_run_has_traced(tmp_path: Path):
    for step, us in (("decode step, batch 1", 1.0), ("decode step, batch 64", 2.0), ("decode step, batch 1", 3.0)):
        Results(tmp_path / "speed.json", {"gpu": "NVIDIA H200"}).add_time("big", step, [Share("idle", us)])

    written = json.loads((tmp_path / "speed.json").read_text())["time"]["big"]
    assert {step: shares[0]["us"] for step, shares in written.items()} == {
        "decode step, batch 1": 3.0,
        "decode step, batch 64": 2.0,
    }


def test_an_engine_is_gone_when_its_part_has_ended(tiny_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engines = []

    def prompt(prompt: Prompt, core: EngineCore) -> list[float]:
        engines.append(weakref.ref(core.worker.model))
        raise RuntimeError("in the middle of it")

    monkeypatch.setattr(speed, "_prompt", prompt)
    bench = make_bench(
        tiny_checkpoint("llama", max_position_embeddings=2048), tmp_path / "speed.json", "^prompt of 512"
    )

    assert not speed._succeeds(bench.measure_engine)
    assert [engine() for engine in engines] == [None]


def test_a_tiny_model_is_measured_through_a_server_that_is_started_twice(tiny_checkpoint, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(figures, "SERVINGS", (Serving(2, 1), Serving(6, 3)))
    path = tiny_checkpoint("llama", max_position_embeddings=2048)
    bench = make_bench(path, tmp_path / "speed.json", "serving|process start")

    bench.measure_server()

    rows = {row["figure"]: row for row in bench.results.values["rows"]}
    assert list(rows) == [
        "process start to first answer, nothing compiled yet",
        "process start to first answer, again",
        "serving one client: TTFT p50",
        "serving one client: TPOT p50",
        "serving 6 x (512/128), 3 at a time",
        *(f"serving 6 x (512/128), 3 at a time: {name} p{p}" for name in ("TTFT", "ITL") for p in (50, 99)),
    ]
    assert all(row["value"] >= 0 for row in rows.values())
    assert rows["serving 6 x (512/128), 3 at a time"]["unit"] == "s"
    (timeline,) = json.loads(bench.results.path.read_text())["start"].values()
    assert timeline[0].split() == ["process", "stage", "from", "s", "took", "s"]
    sums = [float(line.split()[-1]) for line in timeline if line.split()[1] == "all"]
    assert len(sums) == 2
    assert sums[0] == sums[1] <= rows["process start to first answer, again"]["value"]


def test_a_part_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(speed, "environment", lambda: {"gpu": "NVIDIA H200", "git_revision": "r", "date": "d"})
    seen = []

    def measure_engine(bench: ModelBench) -> None:
        seen.append(bench.name)
        raise RuntimeError("the GPU is on fire")

    for name in ("measure_server", "measure_fp8", "measure_invariant"):
        monkeypatch.setattr(ModelBench, name, lambda bench: seen.append(bench.name))
    monkeypatch.setattr(ModelBench, "measure_engine", measure_engine)
    models = [tmp_path / "big", tmp_path / "small"]
    for model in models:
        model.mkdir()
        (model / "config.json").touch()

    code = speed.main([*map(str, models), "--no-parity", "--only", "^$", "--output", str(tmp_path / "speed.json")])

    assert code == 1
    assert seen == ["big", "big", "small", "small", "big", "big", "small", "small"]
    told = capsys.readouterr()
    assert "the GPU is on fire" in told.err
    assert "2 parts failed" in told.out


def test_wrong_tokens_keep_speed_from_being_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "environment", lambda: {"gpu": "NVIDIA H200", "git_revision": "r", "date": "d"})
    modes = [ModeParity("right", 0, "wrong of 2", 0, "fine"), ModeParity("fp8", 6.0, "% not the best", 5.0, "bad")]
    monkeypatch.setattr("bench.modes.check_modes", lambda engine: iter(modes))
    monkeypatch.setattr("engine.hub.resolve_model", lambda name: Path("default.gguf"))
    monkeypatch.setattr(speed, "measure_kernels", lambda results, only: pytest.fail("measured"))

    code = speed.main(["--output", str(tmp_path / "speed.json")])

    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert code == 3
    assert [(row["figure"], row["value"], row["target"], row["met"]) for row in rows] == [
        ("right", 0, 0, True),
        ("fp8", 6.0, 5.0, False),
    ]


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(speed, "environment", lambda: {"gpu": None})

    assert speed.main([]) == 1
    assert "nvidia-smi sees none" in capsys.readouterr().err
