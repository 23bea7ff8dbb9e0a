"""Answers in a form that clients ask for, with a real engine of random weights, through OpenAI's own client."""

import json
import re
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, Field

HELLO = [{"role": "user", "content": "hello"}]


class Item(BaseModel, extra="forbid"):
    name: str = Field(max_length=12)
    colour: Literal["red", "green"]
    sizes: list[int] = Field(min_length=1, max_length=3)
    note: str | None = Field(default=None, max_length=5)


@pytest.fixture(scope="module")
def server(start_server, tiny_checkpoint):
    flags = ["--dtype", "float32", "--kv-cache-memory", "16MiB", "--max-num-seqs", "16"]
    server = start_server(*flags, model=tiny_checkpoint("llama"))
    yield server.wait_ready()
    assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def client(server):
    return server.client


def ask(client, **body) -> str:
    """The text of a completion at temperature 1."""
    given = {"model": "", "prompt": "a", "max_tokens": 300, "seed": 3}
    [choice] = client.completions.create(**given, extra_body=body).choices
    assert choice.finish_reason == "stop"
    return choice.text


def test_the_openai_client_parses_its_own_schema(client):
    for seed in range(4):
        reply = client.chat.completions.parse(
            model="", messages=HELLO, response_format=Item, max_tokens=400, temperature=1, seed=seed
        )
        assert isinstance(reply.choices[0].message.parsed, Item)
        assert reply.choices[0].finish_reason == "stop"


def test_the_openai_client_parses_its_own_schema_in_a_response(client):
    asked = {"model": "", "input": "hello", "text_format": Item, "temperature": 1, "max_output_tokens": 400}
    response = client.responses.parse(**asked)
    assert (response.status, type(response.output_parsed)) == ("completed", Item)
    with client.responses.stream(**asked, background=True) as stream:
        final = stream.get_final_response()
    assert isinstance(final.output_parsed, Item)
    assert final.text.format.name == "Item"
    choice = client.responses.create(
        model="", input="hello", extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert choice.output_text in ("yes", "no")


def test_a_stream_in_several_choices_adds_up_to_valid_json(client):
    response_format = {"type": "json_schema", "json_schema": {"name": "item", "schema": Item.model_json_schema()}}
    texts = ["", "", ""]
    options = {"model": "", "messages": HELLO, "response_format": response_format, "max_tokens": 400, "seed": 1}
    for event in client.chat.completions.create(**options, n=3, stream=True):
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
    assert [type(Item.model_validate_json(text)) for text in texts] == [Item] * 3
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        ({"guided_regex": r"\d{2}-[ab]"}, r"\d{2}-[ab]"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'root ::= "x" [yz] "!"'}, "x[yz]!"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
        ({"guided_json": '{"enum": [1, 2]}'}, "1|2"),
        ({"structured_outputs": {"regex": "(ab|cd){2}"}}, "(ab|cd){2}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'start: "a" B\nB: /[0-9]{3}/'}}, r"a\d{3}"),
        ({"structured_outputs": {"json": {"const": [1, 2]}, "disable_any_whitespace": True}}, r"\[1,2\]"),
        ({"structured_outputs": {"json": {"const": [1]}, "whitespace_pattern": "_"}}, r"_?\[_?1_?\]"),
    ],
)
def test_each_form_holds(client, body, pattern):
    assert re.fullmatch(pattern, ask(client, **body))


def test_what_no_grammar_can_keep_is_refused_unless_the_schema_is_not_strict(client):
    schema = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2, "uniqueItems": True}
    for strict in (None, True, False):
        named = {"name": "two", "schema": schema} | ({} if strict is None else {"strict": strict})
        body = {"response_format": {"type": "json_schema", "json_schema": named}}
        if strict is False:
            assert set(json.loads(ask(client, **body))) <= {1, 2}
            continue
        with pytest.raises(openai.BadRequestError, match="uniqueItems"):
            ask(client, **body)


def test_json_object_is_an_object_of_any_kind(client):
    options = {"model": "", "messages": HELLO, "response_format": {"type": "json_object"}, "max_tokens": 60}
    for seed in range(3):
        [choice] = client.chat.completions.create(**options, seed=seed).choices
        assert choice.message.content.startswith("{")
        assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_a_structural_tag_binds_from_its_trigger_on(client, server):
    """Text is free until "<f"; the bias makes the model write it again and again."""
    tokens = server.post("/tokenize", json={"prompt": "<f", "add_special_tokens": False}).json()["tokens"]
    structures = [{"begin": "<f>", "schema": {"type": "boolean"}, "end": "</f>"}]
    tag = {"type": "structural_tag", "structures": structures, "triggers": ["<f"]}
    options = {"model": "", "prompt": "a", "max_tokens": 60, "logit_bias": {str(token): 12 for token in tokens}}
    found = 0
    for form in ({"response_format": tag}, {"structured_outputs": {"structural_tag": json.dumps(tag)}}):
        for seed in range(3):
            [choice] = client.completions.create(**options, seed=seed, extra_body=form).choices
            *tags, _last = re.split("(?=<f)", choice.text)
            assert all(re.match(r"<f>\s*(true|false)</f>", part) for part in tags[1:]), choice.text
            found += len(tags)
    assert found > 3


def test_allowed_tokens_and_bad_words(client, server):
    tokens = server.post("/tokenize", json={"prompt": "hello", "add_special_tokens": False}).json()["tokens"]
    options = {"model": "", "prompt": "a", "max_tokens": 12}
    [choice] = client.completions.create(
        **options, extra_body={"allowed_token_ids": tokens, "ignore_eos": True}
    ).choices
    assert set(choice.text) <= set("hello")
    [the] = server.post("/tokenize", json={"prompt": " the", "add_special_tokens": False}).json()["tokens"]
    options |= {"temperature": 0, "logit_bias": {str(the): 100}}
    assert " the" in client.completions.create(**options).choices[0].text
    assert "the" not in client.completions.create(**options, extra_body={"bad_words": ["the"]}).choices[0].text


def test_a_grammar_that_leaves_nothing_is_the_clients_fault(server):
    body = {"prompt": "a", "guided_choice": ["ab"], "allowed_token_ids": [300], "max_tokens": 5}
    reply = server.post("/v1/completions", json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["code"] == "grammar_failed"
    assert "no token is left" in reply.json()["error"]["message"]
    assert server.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200


def test_answers_under_a_grammar_survive_the_engines_end(server):
    """Killed in the middle of a stream, the next engine goes on with the grammar where this one was."""
    body = {"prompt": "a", "guided_regex": r"(\d{5}-){12}", "max_tokens": 400, "seed": 7, "stream": True}
    whole = server.post("/v1/completions", json=body | {"stream": False}).json()["choices"][0]["text"]
    text, is_killed = "", False
    with server.client.completions.with_streaming_response.create(
        model="", prompt="a", max_tokens=400, seed=7, stream=True, extra_body={"guided_regex": body["guided_regex"]}
    ) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                if not is_killed and len(text) > 12:
                    server.engine.kill()
                    is_killed = True
    assert re.fullmatch(r"(\d{5}-){12}", text)
    assert text == whole
    assert server.metric("vcli:engine_restarts_total") == 1
