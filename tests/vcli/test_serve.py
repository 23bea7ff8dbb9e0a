"""The whole house behind its front door: real engine processes, asked through OpenAI's client."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import anthropic
import httpx
import psutil
import pydantic
import pytest
from langchain_openai import ChatOpenAI

ROOT = Path(__file__).resolve().parents[2]
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
SMALL = ["--kv-cache-memory", "64MiB"]


@pytest.fixture(scope="module")
def tiny(start_server, tiny_checkpoint):
    return start_server(*SMALL, model=tiny_checkpoint("llama")).wait_ready()


@pytest.fixture(scope="module")
def default(start_server, default_model):
    return start_server(*SMALL, model=default_model).wait_ready()


def test_default_model_knows_the_capital_of_france(default):
    chat = default.client.chat.completions
    whole = chat.create(model="", messages=FRANCE, temperature=0, max_tokens=24, logprobs=True)
    streamed = "".join(
        event.choices[0].delta.content or ""
        for event in chat.create(model="", messages=FRANCE, temperature=0, max_tokens=24, stream=True, logprobs=True)
    )
    assert "Paris" in whole.choices[0].message.content
    assert "Paris" in streamed
    assert whole.choices[0].finish_reason == "stop"


class Weather(pydantic.BaseModel):
    """The weather of a city"""

    city: str
    unit: Literal["C", "F"]


QUESTION = "What is the weather in Paris?"
WEATHER = {"name": "get_weather", "description": "The weather of a city", "parameters": Weather.model_json_schema()}


def test_the_default_model_calls_a_tool_and_hears_what_it_gave(default):
    client, messages = default.client, [{"role": "user", "content": QUESTION}]
    asked = {"model": "", "tools": [{"type": "function", "function": WEATHER}], "temperature": 0, "max_tokens": 60}
    reply = client.chat.completions.create(
        **asked, messages=messages, tool_choice="required", parallel_tool_calls=False
    ).choices[0]
    [call] = reply.message.tool_calls
    assert reply.finish_reason == "tool_calls"
    assert Weather.model_validate_json(call.function.arguments).city == "Paris"
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "purple", "degrees": 19}'}
    messages += [reply.message.to_dict(), result]
    answer = client.chat.completions.create(**asked, messages=messages).choices[0]
    assert "19" in answer.message.content or "purple" in answer.message.content


def test_every_client_calls_tools(default):
    llm = ChatOpenAI(base_url=f"{default.url}/v1", api_key="none", model="", temperature=0, max_retries=0)
    assert llm.with_structured_output(Weather, method="function_calling").invoke(QUESTION).city == "Paris"
    claude = anthropic.Anthropic(base_url=default.url, api_key="none", max_retries=0)
    tool = {"name": "get_weather", "input_schema": Weather.model_json_schema()}
    message = claude.messages.create(
        model="",
        messages=[{"role": "user", "content": QUESTION}],
        tools=[tool],
        tool_choice={"type": "tool", "name": "get_weather"},
        max_tokens=60,
        extra_body={"temperature": 0},
    )
    assert message.stop_reason == "tool_use"
    assert Weather.model_validate(message.content[-1].input)
    response = default.client.responses.create(
        model="",
        input=QUESTION,
        tools=[{"type": "function", **WEATHER}],
        tool_choice={"type": "function", "name": "get_weather"},
        temperature=0,
    )
    assert [item.type for item in response.output] == ["function_call"]
    assert Weather.model_validate_json(response.output[0].arguments)


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    population: int = pydantic.Field(ge=0, le=20_000_000)
    is_capital: bool


def test_anthropics_client_reads_answers_as_its_classes(default):
    """The grammar holds them to the schema."""
    client = anthropic.Anthropic(base_url=default.url, api_key="none", max_retries=0, timeout=60)
    asked = {"model": "", "messages": FRANCE, "max_tokens": 200, "output_format": City}
    message = client.messages.parse(**asked)
    assert isinstance(message.parsed_output, City)
    assert message.stop_reason == "end_turn"
    with client.messages.stream(**asked) as stream:
        assert isinstance(stream.get_final_message().parsed_output, City)


def test_both_processes_say_what_they_are(tiny):
    api = psutil.Process(tiny.process.pid)
    assert api.cmdline()[0].startswith("vcli: api")
    assert tiny.engine.cmdline()[0] == "vcli: engine 0"
    tiny.wait_until(lambda: len(api.children()) == 2)
    tiny.wait_until(lambda: max(api.children(), key=lambda child: child.create_time()).cmdline()[0].endswith("standby"))


def test_whole_streamed_and_batched_answers_are_the_same_tokens(tiny):
    asked = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    prompts = [[5, 6, 7, 8], [9] * 40, [11, 12]]
    alone = [
        tiny.post("/v1/completions", json=asked | {"prompt": prompt}).json()["choices"][0]["token_ids"]
        for prompt in prompts
    ]
    together = tiny.post("/v1/completions", json=asked | {"prompt": prompts}).json()["choices"]
    assert [choice["token_ids"] for choice in together] == alone
    assert [len(token_ids) for token_ids in alone] == [24] * 3


def test_seed_fixes_the_answer_and_n_gives_several(tiny):
    asked = {"prompt": [5, 6, 7], "max_tokens": 16, "seed": 3, "n": 3, "ignore_eos": True, "return_token_ids": True}
    first, second = (tiny.post("/v1/completions", json=asked).json()["choices"] for _ in range(2))
    token_ids = [tuple(choice["token_ids"]) for choice in first]
    assert token_ids == [tuple(choice["token_ids"]) for choice in second]
    assert len(set(token_ids)) == 3


def test_best_of_gives_the_choices_whose_tokens_are_the_likeliest(tiny):
    """Drawn with one seed, they are among those that n gives."""
    asked = {"prompt": [5, 6, 7], "max_tokens": 8, "seed": 3, "ignore_eos": True, "return_token_ids": True}
    everyone = tiny.post("/v1/completions", json=asked | {"n": 6, "logprobs": 0}).json()["choices"]
    everyone.sort(key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
    reply = tiny.post("/v1/completions", json=asked | {"n": 2, "best_of": 6}).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert [choice["token_ids"] for choice in reply["choices"]] == [choice["token_ids"] for choice in everyone[:2]]
    assert reply["choices"][0]["logprobs"] is None
    assert reply["usage"]["completion_tokens"] == 6 * 8, "they have all been made"


def test_sampling_fields_beyond_openais_reach_the_sampler(tiny):
    def token_ids(**fields: object) -> list[int]:
        asked = {"prompt": [5, 6, 7], "max_tokens": 12, "seed": 4, "ignore_eos": True, "return_token_ids": True}
        reply = tiny.post("/v1/completions", json=asked | fields)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["token_ids"]

    greedy, drawn = token_ids(temperature=0), token_ids()
    assert greedy != drawn
    assert token_ids(top_k=1) == token_ids(min_p=1.0) == token_ids(top_p=1e-9) == greedy
    assert token_ids(stop_token_ids=[greedy[3]], temperature=0) == greedy[:4]
    assert token_ids(stop_token_ids=[greedy[3]], temperature=0, min_tokens=8)[:4] != greedy[:4]
    penalized = token_ids(temperature=0, repetition_penalty=100.0)
    assert len(set(penalized)) == 12
    assert token_ids(temperature=0, logit_bias={"9": 100}) == [9] * 12


def test_prompt_is_found_in_the_cache_by_those_who_send_its_salt_alone(tiny):
    def num_cached_tokens(**fields: object) -> int:
        asked = {"prompt": list(range(5, 69)), "max_tokens": 1} | fields
        return tiny.post("/v1/completions", json=asked).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [num_cached_tokens(cache_salt="mine") for _ in range(2)] == [0, 63]
    assert [num_cached_tokens(cache_salt="yours"), num_cached_tokens()] == [0, 0]


def test_client_that_leaves_frees_its_blocks(default):
    body = {"prompt": [5, 6, 7], "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{default.url}/v1/completions", json=body) as reply:
        events = reply.iter_bytes()  # kept: httpx closes the stream with its iterator
        next(events)
        default.wait_until(lambda: default.metric("vcli:kv_cache_usage_perc") > 0)
    default.wait_until(lambda: default.metric("vcli:num_requests_running") == 0)
    assert default.metric("vcli:kv_cache_usage_perc") == 0
    assert default.metric('vcli:request_success_total{finished_reason="abort"') == 1


def test_many_clients_at_once_are_all_answered(tiny):
    statuses = []

    def ask() -> None:
        statuses.append(tiny.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 8}).status_code)

    callers = [threading.Thread(target=ask) for _ in range(100)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert statuses == [200] * 100


def test_sigterm_to_both_processes_lets_a_stream_finish_and_ends_them(start_server, tiny_checkpoint):
    """A supervisor may signal the whole group of processes: the engine leaves it to its parent."""
    server = start_server(*SMALL, model=tiny_checkpoint("llama")).wait_ready()
    engine = server.engine
    body = {"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as reply:
        lines = reply.iter_lines()
        next(lines)
        engine.terminate()
        server.process.terminate()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.process.wait(30) == 0
    assert not engine.is_running()
    assert "the engine starts again" not in server.log


def test_model_that_cannot_be_loaded_is_one_sentence_and_exit_code_1(tiny_checkpoint, tmp_path):
    for file in tiny_checkpoint("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    [weights] = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    done = subprocess.run(
        [sys.executable, "-m", "vcli", "serve", str(tmp_path), "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("vcli: ")
    assert weights.name in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_every_step_is_counted_by_its_size(tiny):
    def num_steps() -> float:
        return tiny.metric("vcli:iteration_tokens_total_count")

    before = num_steps()
    tiny.client.completions.create(model="", prompt=[5] * 7, max_tokens=4, extra_body={"ignore_eos": True})
    assert num_steps() == before + 4


def test_the_stages_of_the_engine_add_up_to_the_wall_clock(tiny):
    """Busy for a while, then idle: an engine with nothing to do says nothing, and its time is counted all the same."""
    tiny.wait_until(lambda: tiny.metric("vcli:num_requests_running") == 0)

    def read() -> tuple[float, float, float]:
        """The stages' sum, and the moments before and after it was read."""
        before = time.monotonic()
        return tiny.metric("vcli:engine_stage_seconds_total"), before, time.monotonic()

    first_s, first_before, first_after = read()
    tiny.client.completions.create(model="", prompt=[5] * 7, max_tokens=200, extra_body={"ignore_eos": True})
    tiny.wait_until(lambda: tiny.metric("vcli:num_requests_running") == 0)
    time.sleep(0.5)
    last_s, last_before, last_after = read()

    assert last_before - first_after <= last_s - first_s <= last_after - first_before
    assert tiny.metric("vcli:detokenize_seconds_total") > 0
