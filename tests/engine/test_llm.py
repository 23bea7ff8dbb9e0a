import itertools
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.llm import LLM
from engine.messages import TokenOutput
from engine.sampling_params import SamplingParams
from tests.conftest import SPOILT_TOKEN

ROOT = Path(__file__).resolve().parents[2]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
OPTIONS = {"device": "cpu", "dtype": "float32", "kv_cache_memory": 1 << 20}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), **OPTIONS)


def assert_nothing_left(llm: LLM) -> None:
    while llm.core.has_work:
        llm.core.step()
    assert llm.core.stats.num_blocks_used == 0
    assert llm.core.stats.num_running == llm.core.stats.num_waiting == 0


def test_results_come_in_order_and_equal_those_of_one_at_a_time(llm: LLM):
    prompts = ["hello", "def f(x):", "the", "a longer prompt than the others, to end last"]
    lengths = [GREEDY, SamplingParams(temperature=0.0, max_tokens=3), GREEDY, GREEDY]
    together = llm.generate(prompts, lengths, use_tqdm=False)
    alone = [llm.generate(prompt, params, use_tqdm=False)[0] for prompt, params in zip(prompts, lengths, strict=True)]
    assert [output.prompt for output in together] == prompts
    assert [output.outputs[0].token_ids for output in together] == [output.outputs[0].token_ids for output in alone]
    assert all(output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids) for output in together)
    assert_nothing_left(llm)


def test_a_prompt_is_text_or_token_ids(llm: LLM):
    token_ids = llm.tokenizer.encode("hello world")
    shapes = ["hello world", {"prompt": "hello world"}, {"prompt_token_ids": token_ids}]
    outputs = llm.generate(shapes, GREEDY, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [token_ids] * 3
    assert [output.prompt for output in outputs] == ["hello world", "hello world", None]
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert llm.generate([]) == []
    for wrong in (3, {"text": "hello"}, ["a", 5]):
        with pytest.raises(TypeError, match="a prompt is a string"):
            llm.generate([wrong], use_tqdm=False)


def test_chat_uses_the_models_template(llm: LLM):
    conversation = [{"role": "user", "content": "hi"}]
    (answer,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert answer.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    same = llm.generate({"prompt_token_ids": llm.tokenizer.encode(answer.prompt)}, GREEDY, use_tqdm=False)[0]
    assert answer.outputs[0].token_ids == same.outputs[0].token_ids
    two = llm.chat([conversation, [*conversation, *conversation]], GREEDY, use_tqdm=False)
    assert [output.prompt.count("hi<|im_end|>") for output in two] == [1, 2]
    (other,) = llm.chat(
        conversation,
        GREEDY,
        use_tqdm=False,
        chat_template="{{ mood }} {{ messages[0].content }}",
        chat_template_kwargs={"mood": "well"},
    )
    assert other.prompt == "well hi"


def test_a_result_says_all_that_was_asked(llm: LLM):
    params = SamplingParams(n=2, max_tokens=5, logprobs=2, prompt_logprobs=1, seed=7, ignore_eos=True)
    (output,) = llm.generate("hello world", params, use_tqdm=False)
    assert [each.index for each in output.outputs] == [0, 1]
    assert output.outputs[0].token_ids != output.outputs[1].token_ids
    assert [len(each.logprobs) for each in output.outputs] == [5, 5]
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None
    assert output.finished
    times = output.metrics
    assert 0 < times.arrival_time <= times.scheduled_time <= times.first_token_time <= times.last_token_time
    (again,) = llm.generate("hello world", params, use_tqdm=False)
    assert [each.token_ids for each in again.outputs] == [each.token_ids for each in output.outputs]


def test_a_stop_string_ends_a_sequence_and_frees_its_blocks(llm: LLM):
    (whole,) = llm.generate("hello", GREEDY, use_tqdm=False)
    text = whole.outputs[0].text
    stop = text[len(text) // 2 :][:2]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=[stop])
    (output,) = llm.generate("hello", params, use_tqdm=False)
    assert output.outputs[0].text == text[: text.index(stop)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    assert_nothing_left(llm)


def test_mistakes_are_told_before_anything_runs(llm: LLM, folder: Path):
    with pytest.raises(ValueError, match="prompt has 600 tokens and --max-model-len is 512"):
        llm.generate(["fine", {"prompt_token_ids": [5] * 600}], use_tqdm=False)
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        llm.generate("hello", [GREEDY, GREEDY], use_tqdm=False)
    with pytest.raises(TypeError, match="no parameter 'max_model_length': did you mean max_model_len"):
        LLM(str(folder), max_model_length=100)
    with pytest.raises(ValueError, match="dtype must be one of auto, bfloat16, float16, float32, got 'int3'"):
        LLM(str(folder), dtype="int3")
    with pytest.raises(UserError, match="nowhere"):
        LLM(str(folder / "nowhere"))
    assert_nothing_left(llm)


def test_nan_ends_the_request_that_has_it_and_no_other(llm: LLM, spoilt_checkpoint: Path):
    prompts = [{"prompt_token_ids": [5, 6, 7, last] * 9} for last in (8, SPOILT_TOKEN, 9)]
    without = {"max_tokens": 9, "ignore_eos": True, "logit_bias": {SPOILT_TOKEN: -100}}
    params = [SamplingParams(temperature=t, seed=3, logprobs=2, **without) for t in (1, 1, 0)]
    sound = llm.generate(prompts, params, use_tqdm=False)
    spoilt = LLM(str(spoilt_checkpoint), **OPTIONS)
    for _ in range(2):
        first, failed, last = spoilt.generate(prompts, params, use_tqdm=False)
        assert (failed.outputs[0].finish_reason, failed.outputs[0].token_ids) == ("error", [])
        assert [output.outputs[0].token_ids for output in (first, last)] == [
            output.outputs[0].token_ids for output in (sound[0], sound[2])
        ]
        assert_nothing_left(spoilt)


def test_nan_in_the_blocks_of_a_common_prefix_is_not_the_end_of_others(llm: LLM, spoilt_checkpoint: Path):
    """The spoilt prompt is computed in two chunks; the second spoils a block that the last prompt has found already."""
    other, common = list(range(10, 54)), [5, 6, 7, 8]
    prompts = [{"prompt_token_ids": ids} for ids in (other, common * 9 + [SPOILT_TOKEN], common * 10)]
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logit_bias={SPOILT_TOKEN: -100})
    spoilt = LLM(str(spoilt_checkpoint), max_num_seqs=8, max_num_batched_tokens=64, max_prefill_chunk=64, **OPTIONS)
    first, failed, last = spoilt.generate(prompts, params, use_tqdm=False)
    assert failed.outputs[0].finish_reason == "error"
    sound = llm.generate(prompts, params, use_tqdm=False)
    assert first.outputs[0].token_ids == sound[0].outputs[0].token_ids
    assert last.outputs[0].token_ids == sound[2].outputs[0].token_ids
    assert_nothing_left(spoilt)


def test_without_a_tokenizer_ids_go_in_and_come_out(llm: LLM, folder: Path):
    bare = LLM(str(folder), skip_tokenizer_init=True, **OPTIONS)
    prompt = {"prompt_token_ids": llm.tokenizer.encode("hello")}
    (output,) = bare.generate(prompt, GREEDY, use_tqdm=False)
    assert output.outputs[0].token_ids == llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    assert output.outputs[0].text == ""
    with pytest.raises(UserError, match="prompt_token_ids"):
        bare.generate("hello", GREEDY, use_tqdm=False)
    with pytest.raises(UserError, match="chat needs the tokenizer"):
        bare.chat([{"role": "user", "content": "hi"}])


def test_ctrl_c_leaves_the_engine_clean(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    expected = llm.generate("hello", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    step, num_steps = llm.core.step, itertools.count()

    def step_under_which_ctrl_c_is_pressed() -> list[TokenOutput]:
        if next(num_steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(llm.core, "step", step_under_which_ctrl_c_is_pressed)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["hello"] * 30, SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False)
    assert next(num_steps) == 6, "it ends with the step"
    assert_nothing_left(llm)
    assert llm.generate("hello", GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected


def test_progress_goes_to_stderr(llm: LLM, capsys: pytest.CaptureFixture[str]):
    llm.generate(["hello", "world"], GREEDY)
    captured = capsys.readouterr()
    assert "2/2 requests" in captured.err
    assert "tok/s out" in captured.err
    assert captured.out == ""


def test_the_package_offers_its_api_and_imports_nothing_before():
    script = "import sys, vcli; assert 'torch' not in sys.modules; from vcli import SamplingParams; " + (
        "assert 'torch' not in sys.modules; from vcli import LLM; print(LLM.__name__, vcli.__version__)"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run.stdout.split() == ["LLM", version]
