"""A server whose cache is too small for its requests, with memory of the host behind it."""

from concurrent.futures import ThreadPoolExecutor

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import AddRequest
from engine.sampling_params import SamplingParams
from tests.vcli.conftest import Server

NUM_STREAMS, NUM_TOKENS = 10, 100


def prompt_of(index: int) -> list[int]:
    return [1 + (7 * index + i * i) % 200 for i in range(200)]


def complete(server: Server, index: int, num_tokens: int = NUM_TOKENS) -> list[int]:
    events = server.client.completions.create(
        model="",
        prompt=prompt_of(index),
        max_tokens=num_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return [token for event in events for token in (event.choices[0].model_extra or {}).get("token_ids") or []]


def tokens_with_room(folder: str) -> list[list[int]]:
    core = EngineCore(EngineConfig(model=folder, device="cpu", dtype="float32", kv_cache_memory=16 << 20))
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for index in range(NUM_STREAMS):
        core.add(AddRequest(str(index), prompt_of(index), params))
    tokens: list[list[int]] = [[] for _ in range(NUM_STREAMS)]
    while core.has_work:
        for output in core.step():
            tokens[int(output.request_id)] += output.token_ids
    return tokens


def test_a_crowd_gets_its_tokens_though_blocks_go_to_the_host_and_an_engine_with_them(start_server, tiny_checkpoint):
    folder = tiny_checkpoint("llama", max_position_embeddings=512)
    memory = ("--kv-cache-memory", "640KiB", "--host-kv-memory", "8MiB")
    server = start_server("--device", "cpu", "--dtype", "float32", *memory, model=folder)
    expected = tokens_with_room(str(folder))
    server.wait_ready()
    complete(server, 0, num_tokens=1)  # whoever has seen short answers alone lets a crowd in, and has to preempt

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(complete, server, index) for index in range(NUM_STREAMS)]
        server.wait_until(lambda: server.metric("vcli:kv_blocks_paged_in_total") > 0)
        server.engine.kill()
        assert [stream.result(timeout=120) for stream in streams] == expected
    assert server.metric("vcli:engine_restarts_total") == 1
    assert server.metric("vcli:num_preemptions_total") > 0
