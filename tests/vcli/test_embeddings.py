"""/v1/embeddings through OpenAI's and LangChain's clients, and the vectors against transformers'."""

import base64
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import openai
import pytest

from engine.tokenizer import Tokenizer
from tests.engine.test_embeddings import hidden_states, pooled

TEXTS = ["hello world", "def f(x):", "the"]


@pytest.fixture(scope="module")
def fake(start_server):
    """Its vectors are the prompt's token ids, eight of them."""
    return start_server().wait_ready()


@pytest.fixture(scope="module")
def server(start_server, tiny_checkpoint):
    flags = ("--device", "cpu", "--dtype", "float32", "--kv-cache-memory", "8MiB")
    return start_server(*flags, model=tiny_checkpoint("llama")).wait_ready()


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def expected(tiny_checkpoint) -> dict[str, np.ndarray]:
    """By pooling, the vectors of TEXTS that transformers' hidden states make."""
    folder = tiny_checkpoint("llama")
    states = hidden_states(folder, Tokenizer.load(str(folder)).encode_batch(TEXTS))
    return {pooling: unit(pooled(states, pooling)) for pooling in ("last", "mean")}


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_vectors_are_those_of_the_model_and_have_length_one(server, expected, pooling, encoding):
    options = {} if encoding is None else {"encoding_format": encoding}
    reply = server.client.embeddings.create(model="", input=TEXTS, extra_body={"pooling": pooling}, **options)
    assert [each.index for each in reply.data] == [0, 1, 2]
    vectors = [each.embedding for each in reply.data]
    if encoding == "base64":  # the client decodes only what it asked for by itself
        vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
    np.testing.assert_allclose(vectors, expected[pooling], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_langchain_gets_the_same_vectors(server, expected):
    from langchain_openai import OpenAIEmbeddings

    client = OpenAIEmbeddings(
        model="", base_url=f"{server.url}/v1", api_key="none", check_embedding_ctx_length=False, max_retries=0
    )
    np.testing.assert_allclose(client.embed_documents(TEXTS), expected["last"], atol=1e-5)
    np.testing.assert_allclose(client.embed_query(TEXTS[1]), expected["last"][1], atol=1e-5)


def test_vectors_outlive_the_engine_that_was_to_make_them(server, expected):
    """It is killed with a hundred prompts on their way to it; another one makes the vectors."""
    num_restarts, engine = server.metric("vcli:engine_restarts_total"), server.engine
    engine.send_signal(signal.SIGSTOP)  # so that it cannot be done before
    ask = partial(server.client.embeddings.create, model="", input=TEXTS * 33, extra_body={"pooling": "mean"})
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        time.sleep(0.3)
        engine.send_signal(signal.SIGKILL)
        vectors = [each.embedding for each in asked.result().data]
    np.testing.assert_allclose(vectors, np.tile(expected["mean"], (33, 1)), atol=1e-5)
    assert server.metric("vcli:engine_restarts_total") == num_restarts + 1


@pytest.mark.parametrize(
    ("given", "prompts"),
    [("hello", None), ([5, 6, 7], [[5, 6, 7]]), ([[5, 6], [7]], [[5, 6], [7]])],
    ids=["text", "tokens", "lists of tokens"],
)
def test_an_input_is_text_or_token_ids(fake, given, prompts):
    prompts = prompts or [fake.post("/tokenize", json={"prompt": given}).json()["tokens"]]
    reply = fake.post("/v1/embeddings", json={"input": given, "normalize": False}).json()
    assert [each["embedding"] for each in reply["data"]] == [
        [prompt[i % len(prompt)] for i in range(8)] for prompt in prompts
    ]
    num_tokens = sum(map(len, prompts))
    details = {"cached_tokens": len(prompts)}
    assert reply["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "prompt_tokens_details": details}


def test_a_prompt_that_is_too_long_is_cut_where_asked(fake):
    body = {"input": list(range(3, 103)), "normalize": False, "truncate_prompt_tokens": 10}
    reply = fake.post("/v1/embeddings", json=body).json()
    assert reply["data"][0]["embedding"] == list(range(93, 101)), "the last ten are left"
    assert reply["usage"]["prompt_tokens"] == 10


def test_fewer_dimensions_are_the_first_ones_at_length_one(fake):
    reply = fake.client.embeddings.create(model="", input=[3, 4, 5], dimensions=2)
    np.testing.assert_allclose(reply.data[0].embedding, [0.6, 0.8], atol=1e-6)


def test_embeddings_count_among_the_latencies_and_as_no_answers(fake):
    names = ("e2e_request_latency_seconds_count", "time_to_first_token_seconds_count")
    before = [fake.metric(f"vcli:{name}") for name in names]
    fake.client.embeddings.create(model="", input=["a", "b"])
    assert [fake.metric(f"vcli:{name}") for name in names] == [before[0] + 2, *before[1:]]


def test_what_openai_takes_and_we_do_not_need_is_ignored(fake):
    assert len(fake.client.embeddings.create(model="", input="a", user="me").data) == 1


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "required"),
        ({"input": 3}, "input", "must be"),
        ({"input": []}, "input", "input must be a string, a list of strings"),
        ({"input": ["a", 1]}, "input", "input must be a string, a list of strings"),
        ({"input": ""}, None, "empty"),
        ({"input": ["a", ""]}, None, "empty"),
        ({"input": [99999]}, None, "99,999"),
        ({"input": [5] * 600}, None, "600 tokens"),
        ({"input": "a", "dimensions": 9}, "dimensions", "between 1 and 8, the model's hidden size, got 9"),
        ({"input": "a", "dimensions": 0}, "dimensions", "between 1 and 8"),
        ({"input": "a", "pooling": "cls"}, "pooling", "cls"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "hex"),
        ({"input": [[5]] * 3000}, None, "3,000 sequences"),
    ],
)
def test_what_cannot_be_embedded_is_refused_with_the_reason(fake, body, param, words):
    reply = fake.post("/v1/embeddings", json=body)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"] == param


def test_an_unknown_model_is_not_found(fake):
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        fake.client.embeddings.create(model="text-embedding-3-small", input="a")
