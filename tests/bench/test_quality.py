"""Two checkpoints held against each other; the same figures by brute force, from transformers' logits in float64."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import observation
from bench.baseline import load_transformers
from bench.config import HELD_OUT_TEXT, QualityConfig
from bench.quality import LayerError, Quality, held_out_windows, measure
from bench.quality_page import summary, to_html
from bench.quality_report import FORMATS, quality_table, read, shown, to_csv, to_markdown, write, write_file
from engine.config import EngineConfig
from engine.errors import UserError
from engine.quantization.weight import Scheme, round_to_nearest
from tests.bench.results import section_marks, updated_readme

INT4 = Scheme("int", 4, (1, 32))
TWO_WINDOWS = QualityConfig(windows=2)


def engine_of(path: Path, **changes: object) -> EngineConfig:
    values = {"device": "cpu", "max_num_seqs": 16, "kv_cache_memory": 16 << 20}
    return EngineConfig(model=str(path), **(values | changes))


def changed_copy(path: Path, copy: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A checkpoint of one file with every tensor changed."""
    shutil.copytree(path, copy)
    tensors = load_file(copy / "model.safetensors")
    changed = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(changed, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.fixture(autouse=True)
def no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of comparing tiny models, and only `quality`, which is made before, is looked at for it."""
    rates = dict.fromkeys(("decode_1", "decode_16", "decode_64", "prefill"))
    monkeypatch.setattr(observation, "measure_speed", lambda core, on_progress: dict(rates))


@pytest.fixture(scope="session")
def original(tiny_checkpoint) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="session")
def rounded(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original with its linear layers rounded to 4 bits."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return round_to_nearest(tensor, INT4).dequantize() if "_proj" in name else tensor

    return changed_copy(original, tmp_path_factory.mktemp("rounded") / "tiny-rounded", change)


@pytest.fixture(scope="session")
def quality(original: Path, rounded: Path) -> Quality:
    return measure(engine_of(original), engine_of(rounded), TWO_WINDOWS, recipe={"name": "int4 rtn g32", "seconds": 75})


def transformers_figures(before: Path, after: Path, windows: list[list[int]]) -> dict[str, float]:
    """Perplexities, KL divergence and agreement, from transformers' float32 logits, position by position in float64."""
    models = [load_transformers(path, "auto", torch.device("cpu"), torch.float32) for path in (before, after)]
    costs: list[list[float]] = [[], []]
    divergences, agreements = [], []
    for window in windows:
        logits = [model(torch.tensor([window])).logits[0].double().numpy() for model in models]
        for position, target in enumerate(window[1:]):
            p, q = (np.exp(each[position] - each[position].max()) for each in logits)
            p, q = p / p.sum(), q / q.sum()
            costs[0].append(-np.log(p[target]))
            costs[1].append(-np.log(q[target]))
            divergences.append((p * np.log(p / q)).sum())
            agreements.append(p.argmax() == q.argmax())
    in_order = sorted(divergences)
    place = 0.99 * (len(in_order) - 1)
    below, above = in_order[int(place)], in_order[int(place) + 1]
    return {
        "before": np.exp(np.mean(costs[0])),
        "after": np.exp(np.mean(costs[1])),
        "mean": np.mean(divergences),
        "p99": below + (above - below) * (place - int(place)),
        "top1": np.mean(agreements),
    }


def figures_of(quality: Quality) -> dict[str, float]:
    kl = {name: quality.kl[name] for name in ("mean", "p99")}
    return {**quality.perplexity, **kl, "top1": quality.top1_agreement}


def test_the_figures_are_those_of_transformers_logits(original, rounded, quality):
    windows = held_out_windows(TWO_WINDOWS, engine_of(original))
    assert [len(window) for window in windows] == [512, 512], "the model's length"

    expected = transformers_figures(original, rounded, windows)

    assert figures_of(quality) == pytest.approx(expected, rel=2e-4)
    assert expected["mean"] > 0.005
    assert quality.text["scored_tokens"] == 2 * 511


def test_the_default_models_perplexity_is_that_of_transformers_logits(default_model):
    """In float32; bfloat16 held against it is not the same, but near."""
    exact = engine_of(default_model, dtype="float32", max_model_len=256, max_num_seqs=1, max_num_batched_tokens=256)

    quality = measure(exact, replace(exact, dtype="bfloat16"), TWO_WINDOWS)

    by_transformers = 33.667683  # 5.23, in float32, on the same two windows
    assert quality.perplexity["before"] == pytest.approx(by_transformers, rel=1e-5)
    assert quality.perplexity["after"] == pytest.approx(by_transformers, rel=0.01)
    assert 0 < quality.kl["mean"] < 0.01


def test_every_time_the_same_is_measured_but_the_speed(original, rounded, quality):
    again = measure(engine_of(original), engine_of(rounded, max_num_batched_tokens=512), TWO_WINDOWS)

    assert figures_of(again) == figures_of(quality)
    assert again.layers == quality.layers
    assert again.kl_histogram == quality.kl_histogram


def test_a_checkpoint_held_against_itself_has_lost_nothing(original):
    quality = measure(engine_of(original), engine_of(original), QualityConfig(windows=1))

    assert quality.kl == {"mean": 0, "p50": 0, "p99": 0, "max": 0}
    assert quality.top1_agreement == 1
    assert quality.ppl_increase_perc == 0
    assert {layer.error for layer in quality.layers} == {0}
    assert quality.failures(QualityConfig(max_ppl_increase=0, max_kl=0)) == []


def test_text_goes_through_the_engine_in_chunks_as_prompts_do(original, rounded, quality):
    """Of 100 tokens: sums are then made in another order."""
    chunked = measure(
        engine_of(original, max_num_batched_tokens=100), engine_of(rounded, max_num_batched_tokens=100), TWO_WINDOWS
    )

    assert figures_of(chunked) == pytest.approx(figures_of(quality), rel=1e-4)


def test_the_error_of_a_layer_is_its_own_and_goes_on_in_those_above_it(tiny_checkpoint, tmp_path: Path):
    path = tiny_checkpoint("llama", num_hidden_layers=4)
    worse = changed_copy(
        path, tmp_path / "worse", lambda name, tensor: tensor * 1.5 if "layers.1.mlp.down_proj" in name else tensor
    )

    quality = measure(engine_of(path), engine_of(worse), QualityConfig(windows=1))

    alone, up_to = (
        [layer.error for layer in quality.layers if layer.part == part] for part in ("layer alone", "up to the layer")
    )
    assert [error > 0.05 for error in alone] == [False, True, False, False]
    assert [error > 0.05 for error in up_to] == [False, True, True, True]
    assert alone[0] == alone[2] == alone[3] == up_to[0] == 0


def test_models_of_unlike_layers_are_compared_without_them(tiny_checkpoint, original):
    deeper = tiny_checkpoint("llama", num_hidden_layers=3)

    quality = measure(engine_of(original), engine_of(deeper), QualityConfig(windows=1))

    assert quality.layers == []
    assert quality.kl["mean"] > 0


def test_size_is_that_of_the_weights_in_memory_and_of_their_files(original, quality):
    tensors = load_file(original / "model.safetensors")

    assert quality.bytes["before"] == sum(tensor.nbytes for tensor in tensors.values())
    assert quality.file_bytes["before"] == (original / "model.safetensors").stat().st_size


def test_a_model_rounded_as_it_loads_takes_less_memory_and_the_same_files(original):
    """float32 becomes e4m3: a quarter of the linear layers is left, and a scale for each output."""
    quality = measure(engine_of(original), engine_of(original, quantization="fp8"), QualityConfig(windows=1))

    linear = sum(t.numel() for name, t in load_file(original / "model.safetensors").items() if "_proj" in name)
    saved = quality.bytes["before"] - quality.bytes["after"]
    assert 0.9 * 3 * linear < saved < 3 * linear
    assert quality.file_bytes["before"] == quality.file_bytes["after"]
    assert quality.kl["mean"] > 0


def test_speed_is_measured_where_there_is_room_for_the_batch(quality):
    assert list(quality.tokens_per_s) == ["decode_1", "decode_16", "decode_64", "prefill"]
    assert quality.tokens_per_s.pop("decode_64") == {"before": None, "after": None}, "16 requests at most"
    assert all(pair["before"] > 0 and pair["after"] > 0 for pair in quality.tokens_per_s.values())
    quality.tokens_per_s["decode_64"] = {"before": None, "after": None}


def test_a_gate_that_is_not_passed_says_what_was_found_and_what_is_allowed(quality):
    low = QualityConfig(max_ppl_increase=0.5, max_kl=0.001)
    worse = replace(quality, perplexity={"before": 31.4, "after": 42.2})

    perplexity, divergence = worse.failures(low)

    assert perplexity == "the perplexity rose by 34.39%, from 31.40 to 42.20: --max-ppl-increase allows 0.5%"
    assert divergence.endswith("nats a token: --max-kl allows 0.001")
    assert worse.failures(QualityConfig(max_ppl_increase=worse.ppl_increase_perc, max_kl=worse.kl["mean"])) == []
    assert worse.failures(QualityConfig()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (QualityConfig(text=Path("nowhere.txt")), r"--text nowhere\.txt cannot be read"),
        (QualityConfig(windows=10**6), r"persuasion\.txt has [\d,]+ tokens, but 1000000 windows of 512"),
    ],
)
def test_a_text_that_will_not_do_is_told_before_a_model_is_loaded(original, options, words):
    with pytest.raises(UserError, match=words):
        measure(engine_of(original), engine_of(original), options, on_progress=must_not_run)


def test_text_that_is_no_text_is_told(original, tmp_path: Path):
    text = tmp_path / "text.bin"
    text.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        held_out_windows(QualityConfig(text=text), engine_of(original))


def test_models_of_two_vocabularies_are_refused_before_one_is_loaded(original, tiny_checkpoint, tmp_path: Path):
    other_size = tiny_checkpoint("llama", vocab_size=640)
    with pytest.raises(UserError, match=r"the vocabularies have 512 and 640 tokens"):
        measure(engine_of(original), engine_of(other_size), TWO_WINDOWS, on_progress=must_not_run)

    other_words = tmp_path / "other-words"
    shutil.copytree(original, other_words)
    tokenizer = json.loads((other_words / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]
    (other_words / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"read persuasion\.txt as different tokens"):
        measure(engine_of(original), engine_of(other_words), TWO_WINDOWS, on_progress=must_not_run)


def test_what_is_not_a_model_is_refused_before_one_is_loaded(original, tmp_path: Path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        measure(engine_of(original), engine_of(tmp_path), TWO_WINDOWS, on_progress=must_not_run)


def must_not_run(stage: str, fraction: float) -> None:
    raise AssertionError(f"got as far as {stage}")


def test_broken_weights_are_named(original, tmp_path: Path):
    broken = changed_copy(
        original, tmp_path / "broken", lambda name, t: t * float("nan") if name == "model.norm.weight" else t
    )

    with pytest.raises(UserError, match="broken makes logits of the text that are no numbers"):
        measure(engine_of(original), engine_of(broken), QualityConfig(windows=1))


def test_quality_json_comes_back_as_it_was_and_has_the_agreed_names(quality, tmp_path: Path):
    quality = replace(quality, layers=[*quality.layers, LayerError(1, "self_attn.q_proj", 0.08)])

    write(quality, tmp_path)

    assert read(tmp_path / "quality.json") == quality
    values = json.loads((tmp_path / "quality.json").read_text())
    assert values["kind"] == "quality"
    assert set(values["perplexity"]) == set(values["bytes"]) == {"before", "after"}
    assert {"mean", "p99"} <= set(values["kl"])
    assert sum(values["kl_histogram"]["shares"]) == pytest.approx(1)
    assert values["layers"][-1] == {"layer": 1, "part": "self_attn.q_proj", "error": 0.08}
    assert values["text"]["name"] == HELD_OUT_TEXT.name
    assert values["environment"]["torch"] == torch.__version__


def test_the_table_says_what_changed(quality):
    quality = replace(quality, perplexity={"before": 20.0, "after": 21.0}, bytes={"before": 10**8, "after": 25 * 10**6})

    columns, rows = quality_table(quality)

    assert columns == ["figure", "before", "after", "change"]
    lines = {row[0]: row[1:] for row in rows}
    assert lines["perplexity"] == ["20.00", "21.00", "+5.00%"]
    assert lines["weights in memory (MB)"] == ["100.0", "25.0", "-75.00%"]
    assert lines["decode, batch 64 (tok/s)"] == ["-", "-", "-"]
    assert "| perplexity | 20.00 | 21.00 | +5.00% |" in to_markdown(quality)


@pytest.mark.parametrize(
    ("load", "device", "is_told"), [(9.5, "cpu", True), (2.5, "cpu", False), (9.5, "cuda:0", False)]
)
def test_speeds_of_a_busy_cpu_are_told_to_say_little(quality, load: float, device: str, is_told: bool):
    env = quality.environment | {"load_average": load, "cpu_count": 2, "gpu": "A GPU"}
    quality = replace(quality, environment=env, device=device)

    assert ("load average 9.5 on 2 cores" in to_markdown(quality)) == is_told
    assert ("The machine was busy" in Page(to_html(quality)).text) == is_told


def test_numbers_are_shown_with_four_digits_that_count():
    values = (0, 0.00421337, 0.31234, 31.4159, 9.99999, 123.44, 1234.5, 45678.0, None)
    assert [shown(value) for value in values] == [
        "0", "0.004213", "0.3123", "31.42", "10.00", "123.4", "1,234", "45,678", "-",
    ]  # fmt: skip


class Page(HTMLParser):
    """What a browser sees: the elements, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def bars(self, title: str) -> list[float]:
        """The heights of a chart's bars, in percent."""
        first = next(i for i, (_, values) in enumerate(self.elements) if values.get("aria-label") == title)
        inside = itertools.takewhile(lambda element: element[0] != "svg", self.elements[first + 1 :])
        return [float(values["height"] or 0) for tag, values in inside if tag == "rect"]


def test_the_page_needs_nothing_beside_it_and_shows_every_layer(quality):
    errors = [LayerError(layer, part, 0.1 * (layer + 1)) for part in ("mlp.up_proj", "<b>") for layer in range(2)]

    html = to_html(replace(quality, layers=[*quality.layers, *errors], after="tiny <int4> & co"))

    page = Page(html)
    assert page.open == []
    assert not {"script", "link", "img", "int4"} & {tag for tag, _ in page.elements}
    assert not re.search(r"https?:|url\(|@import", html)
    assert "tiny <int4> & co" in page.text
    assert "int4 rtn g32 in 75 s" in page.text
    assert page.bars("mlp.up_proj") == page.bars("<b>") == [50, 100]
    assert len(page.bars("What each layer gets wrong by itself")) == 2
    assert sum(quality.kl_histogram["shares"]) == pytest.approx(1)
    assert max(page.bars("share of the positions by KL divergence")) == 100


def test_the_page_says_in_words_what_changed(quality):
    perplexity, size, speed = (
        {"before": 20.0, "after": 21.0},
        {"before": 400, "after": 100},
        {"before": 10, "after": 15},
    )
    rates = quality.tokens_per_s | {"decode_1": speed}
    env = quality.environment | {"load_average": 0.5}
    quality = replace(quality, perplexity=perplexity, bytes=size, tokens_per_s=rates, top1_agreement=0.875)
    quality = replace(quality, environment=env)

    assert summary(quality) == (
        "It predicts the text 5.0% worse than the original (perplexity 20.00 to 21.00), and at 87.5% of the positions "
        "both find the same next token most likely. Its weights take 75% less memory. "
        "A request alone is answered at 1.50 times the speed."
    )


def test_a_page_of_what_cannot_be_compared_is_a_page_too(quality):
    """No layers, no speed, no divergence at all, no recipe."""
    rates = {name: {"before": None, "after": None} for name in quality.tokens_per_s}
    shares = [1.0] + [0.0] * (len(quality.kl_histogram["shares"]) - 1)
    nothing = {"mean": 0.0, "p50": 0.0, "p99": 0.0, "max": 0.0}
    histogram = quality.kl_histogram | {"shares": shares}

    page = Page(
        to_html(replace(quality, layers=[], tokens_per_s=rates, kl=nothing, kl_histogram=histogram, recipe=None))
    )

    assert page.open == []
    assert "none can be compared" in page.text
    assert "not measured" in page.text


def test_the_readme_gets_a_line_for_each_recipe_and_the_commands(quality, tmp_path: Path):
    env = quality.environment | {
        "command": "vcli quantize --int4 -o out",
        "git_revision": "0123456789a",
        "cpu": "A CPU",
    }
    env |= {"cpu_count": 2, "git_dirty": False}
    for name, after in (("rtn", 42.2), ("gptq", 34.1)):
        recipe = {"name": f"int4 {name} g64", "seconds": 312.4}
        kl = {"mean": 0.0812, "p99": 1.5, "p50": 0.05, "max": 3.0}
        one = replace(
            quality, before="tiny", perplexity={"before": 31.41, "after": after}, kl=kl, recipe=recipe, environment=env
        )
        one = replace(one, top1_agreement=0.876, bytes={"before": 269_030_016, "after": 118_000_000})
        write_file(one, tmp_path / f"cpu-quality-{name}.json")

    once = updated_readme(tmp_path, section_marks("results") + section_marks("quality") + "End\n")

    assert (
        "| tiny | int4 gptq g64 | 31.41 → 34.10 | +8.56% | 0.08120 / 1.500 | 87.6% | 269.0 → 118.0 | 5.2 min | "
        "A CPU (2 cores) | 012345678 |"
    ) in once
    assert once.index("int4 gptq") < once.index("int4 rtn")
    assert once.count("vcli quantize --int4 -o out") == 1
    assert "old" not in once


@pytest.mark.parametrize("extension", FORMATS)
def test_every_extension_writes_a_file_that_names_the_checkpoint(quality, tmp_path: Path, extension: str):
    path = tmp_path / "new" / f"compared{extension}"

    write_file(quality, path)

    assert "tiny-rounded" in path.read_text()


def test_csv_is_one_line(quality):
    header, line = to_csv(quality).splitlines()

    assert "perplexity.before" in header
    assert "tiny-rounded" in line


def test_a_file_that_is_no_comparison_is_named(tmp_path: Path):
    (tmp_path / "x.json").write_text('{"kind": "serving"}')

    with pytest.raises(UserError, match=r"x\.json is not a result of `vcli bench --quality`"):
        read(tmp_path / "x.json")
