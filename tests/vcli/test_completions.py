"""Both generating endpoints through OpenAI's own client. The engine behind them repeats the prompt."""

import json

import openai
import pytest

PROMPT = "import json"


@pytest.fixture(scope="module")
def server(start_server):
    return start_server().wait_ready()


@pytest.fixture(scope="module")
def client(server):
    return server.client


def test_completion_comes_whole_with_its_counts(client, server):
    tokens = server.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    reply = client.completions.create(model="", prompt=PROMPT, max_tokens=len(tokens))
    assert reply.choices[0].text == PROMPT
    assert reply.choices[0].finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(tokens), len(tokens))
    assert reply.usage.prompt_tokens_details.cached_tokens == 1


def test_stream_adds_up_to_the_whole_and_ends_with_usage(client):
    whole = client.completions.create(model="", prompt=PROMPT, max_tokens=40)
    events = list(
        client.completions.create(
            model="", prompt=PROMPT, max_tokens=40, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(event.choices[0].text for event in events[:-1]) == whole.choices[0].text
    assert [event.choices[0].finish_reason for event in events[:-1]][-1] == "length"
    assert events[-1].choices == []
    assert events[-1].usage == whole.usage


def test_usage_comes_with_every_event_where_asked(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = client.completions.create(model="", prompt=PROMPT, max_tokens=20, stream=True, stream_options=options)
    counts = [event.usage.completion_tokens for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 20


def test_chat_streams_role_first_and_text_after(client):
    messages = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(model="", messages=messages, max_tokens=4)
    events = list(client.chat.completions.create(model="", messages=messages, max_tokens=4, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    assert all(event.choices[0].delta.role is None for event in events[1:])
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == whole.choices[0].message.content
    assert whole.choices[0].message.role == "assistant"


def test_chat_is_what_the_template_makes_of_it(server):
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    tokens = server.post("/tokenize", json={"messages": messages}).json()["tokens"]
    text = server.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    reply = server.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
    assert reply["usage"]["prompt_tokens"] == len(tokens)


def test_developer_is_the_system_to_a_template_that_knows_no_developer(server):
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    tokens = server.post("/tokenize", json={"messages": messages}).json()["tokens"]
    text = server.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>")


def test_last_message_can_be_continued(server):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello the"}]
    tokens = server.post("/tokenize", json={"messages": messages, "continue_final_message": True}).json()["tokens"]
    text = server.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text.endswith("<|im_start|>assistant\nHello the")


def test_n_choices_for_each_of_several_prompts(client):
    reply = client.completions.create(model="", prompt=["first", "second thing"], n=3, max_tokens=3, echo=True)
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert [choice.text.startswith("first") for choice in reply.choices] == [True] * 3 + [False] * 3
    assert reply.usage.completion_tokens == 18


def test_streams_of_several_prompts_keep_apart(client):
    prompts = ["first", "second thing", "third"]
    whole = client.completions.create(model="", prompt=prompts, n=2, max_tokens=7)
    texts = dict.fromkeys(range(6), "")
    for event in client.completions.create(model="", prompt=prompts, n=2, max_tokens=7, stream=True):
        texts[event.choices[0].index] += event.choices[0].text
    assert [texts[index] for index in range(6)] == [choice.text for choice in whole.choices]


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7], [8, 9]]])
def test_prompts_may_be_token_ids(server, prompt):
    reply = server.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2, "return_token_ids": True}).json()
    prompts = prompt if isinstance(prompt[0], list) else [prompt]
    assert [choice["token_ids"] for choice in reply["choices"]] == [each[:2] for each in prompts]
    assert [choice["prompt_token_ids"] for choice in reply["choices"]] == prompts


def test_stop_string_cuts_the_text_and_is_named(server):
    for stop in ("json", ["nowhere", "json"]):
        body = {"prompt": PROMPT, "max_tokens": 40, "stop": stop}
        [choice] = server.post("/v1/completions", json=body).json()["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("import ", "stop", "json")
    [choice] = server.post("/v1/completions", json=body | {"include_stop_str_in_output": True}).json()["choices"]
    assert choice["text"] == "import json"


def test_stop_token_ends_the_text(server):
    body = {"prompt": [50, 60, 70], "max_tokens": 40, "stop_token_ids": [70], "return_token_ids": True}
    [choice] = server.post("/v1/completions", json=body).json()["choices"]
    assert (choice["token_ids"], choice["stop_reason"]) == ([50, 60, 70], 70)


def test_completion_logprobs_are_parallel_lists(client):
    reply = client.completions.create(model="", prompt=PROMPT, max_tokens=4, logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert "".join(logprobs.tokens) == reply.choices[0].text
    assert logprobs.token_logprobs == [-0.5] * 4
    assert [len(top) for top in logprobs.top_logprobs] == [2] * 4
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(4)]


def test_echo_with_logprobs_scores_the_prompt_alone(client):
    reply = client.completions.create(model="", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    logprobs = reply.choices[0].logprobs
    assert reply.choices[0].text == PROMPT
    assert "".join(logprobs.tokens) == PROMPT
    assert logprobs.token_logprobs[0] is None
    assert set(logprobs.token_logprobs[1:]) == {-0.5}
    assert reply.usage.completion_tokens == 0


def test_streamed_echo_and_logprobs_equal_the_whole(client):
    asked = {"model": "", "prompt": PROMPT, "max_tokens": 5, "echo": True, "logprobs": 1}
    whole = client.completions.create(**asked).choices[0]
    events = [event.choices[0] for event in client.completions.create(**asked, stream=True)]
    assert "".join(event.text for event in events) == whole.text
    assert [token for event in events for token in event.logprobs.tokens] == whole.logprobs.tokens
    assert [offset for event in events for offset in event.logprobs.text_offset] == whole.logprobs.text_offset


def test_chat_logprobs_carry_bytes(client):
    messages = [{"role": "user", "content": "é"}]
    reply = client.chat.completions.create(
        model="", messages=messages, max_tokens=12, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True}
    )
    content = reply.choices[0].logprobs.content
    assert len(content) == 12
    assert "é" in bytes(byte for token in content for byte in token.bytes).decode()
    assert [len(token.top_logprobs) for token in content] == [3] * 12


def test_prompt_logprobs_come_by_token_id(server):
    body = {"prompt": [50, 60], "max_tokens": 1, "prompt_logprobs": 1}
    [choice] = server.post("/v1/completions", json=body).json()["choices"]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second["60"]["logprob"] == -0.5
    assert second["60"]["rank"] == 1


@pytest.mark.parametrize("limit", [1, 4, -1, 500])
def test_long_prompt_can_be_cut_to_its_end(server, limit):
    prompt = [7, 8, *range(3, 503)]
    body = {"prompt": prompt, "max_tokens": 12, "truncate_prompt_tokens": limit, "return_token_ids": True}
    reply = server.post("/v1/completions", json=body).json()
    num_left = 512 - 12 if limit == -1 else limit
    assert reply["choices"][0]["prompt_token_ids"] == prompt[-num_left:]
    assert reply["usage"]["prompt_tokens"] == num_left


def test_cut_prompt_is_echoed_as_it_was_cut(client):
    cut = {"truncate_prompt_tokens": 1}
    text = client.completions.create(model="", prompt=PROMPT, echo=True, max_tokens=1, extra_body=cut).choices[0].text
    assert text == "jsonjson", "the last token, repeated"


@pytest.mark.parametrize(("shown", "text"), [(True, "a<|im_end|>b"), (False, "ab")])
def test_special_tokens_are_shown_where_asked(client, shown, text):
    asked = {"skip_special_tokens": not shown, "ignore_eos": True}
    reply = client.completions.create(model="", prompt="a<|im_end|>b", max_tokens=3, extra_body=asked)
    assert reply.choices[0].text == text


def test_tokens_come_with_their_texts_where_asked(server):
    reply = server.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
    assert "".join(reply["token_strs"]) == PROMPT
    assert len(reply["token_strs"]) == reply["count"]


def test_tokens_can_be_named_by_their_ids(client):
    asked = {"model": "", "prompt": [50, 60], "max_tokens": 2, "logprobs": 1}
    reply = client.completions.create(**asked, extra_body={"return_tokens_as_token_ids": True})
    assert reply.choices[0].logprobs.tokens == ["token_id:50", "token_id:60"]
    assert reply.choices[0].logprobs.top_logprobs[0] == {"token_id:50": -0.5}


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": ["one", "another"], "n": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "n": 3, "logprobs": True}),
    ],
)
def test_every_choice_of_a_stream_is_that_of_the_whole(server, path, asked):
    """With all that stands beside the text."""
    asked |= {"max_tokens": 5, "return_token_ids": True, "ignore_eos": True}
    whole = server.post(path, json=asked).json()
    lines = server.post(path, json=asked | {"stream": True}).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    for choice in whole["choices"]:
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert [token_id for piece in pieces for token_id in piece["token_ids"]] == choice["token_ids"]
        if "text" in choice:
            assert "".join(piece["text"] for piece in pieces) == choice["text"]
            assert pieces[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        else:
            assert "".join(piece["delta"].get("content", "") for piece in pieces) == choice["message"]["content"]
            assert [piece["delta"].get("role") for piece in pieces][:2] == ["assistant", None]
            logprobs = [token for piece in pieces for token in piece["logprobs"]["content"]]
            assert logprobs == choice["logprobs"]["content"]
            assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
        assert pieces[-1]["finish_reason"] == choice["finish_reason"] == "length"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_only_others_know_is_ignored(server, path):
    """Parameters of OpenAI's own service, which change nothing about the answer."""
    asked = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    extras = {"user": "me", "service_tier": "flex", "store": True, "metadata": {"a": "b"}, "safety_identifier": "x"}
    extras |= {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "verbosity": "low", "prediction": None}
    reply, plain = (server.post(path, json=body).json()["choices"] for body in (asked | extras, asked))
    assert reply == plain


def test_model_is_listed_with_its_root_and_limit(client, model_folder):
    [entry] = client.models.list().data
    assert entry.id == str(model_folder)
    assert (entry.root, entry.max_model_len) == (str(model_folder), 512)
    assert client.models.retrieve(entry.id).id == entry.id


def test_null_means_not_given(server):
    body = {"prompt": "a", "stop": None, "temperature": None, "n": None, "logprobs": None, "stream": None, "user": "me"}
    assert server.post("/v1/completions", json=body).status_code == 200


def test_requests_are_counted(server):
    before = server.metric("vcli:request_success_total")
    server.post("/v1/completions", json={"prompt": "abc", "n": 2, "max_tokens": 5})
    server.wait_until(lambda: server.metric("vcli:request_success_total") == before + 2)
    assert server.metric("vcli:time_to_first_token_seconds_count") >= 1
    assert server.metric("vcli:inter_token_latency_seconds_count") >= 8
    assert "vcli:kv_cache_waste_perc" in server.get("/metrics").text


def test_prompt_that_is_too_long_is_refused_with_the_numbers(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="", prompt=list(range(3, 503)) * 2)
    assert caught.value.code == "context_length_exceeded"
    assert "1,000 tokens" in str(caught.value)
    assert "512" in str(caught.value)


def test_unknown_model_is_named(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "a"}])
    assert caught.value.code == "model_not_found"
    assert "gpt-9" in str(caught.value)
