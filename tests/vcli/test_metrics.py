"""A scrape as Prometheus reads it: the names that were promised, their types, and what they say under load."""

import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.vcli.conftest import Server, StartServer

PROMISED = {
    "gauge": {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "kv_cache_waste_perc",
        "gpu_memory_bytes",
        "gpu_memory_fragmentation_perc",
        "predicted_queue_seconds",
        "utilization_perc",
    },
    "counter": {  # with _total behind them
        "prompt_tokens",
        "generation_tokens",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
        "request_success",
        "admission_rejections",
        "engine_restarts",
    },
    "histogram": {
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "iteration_tokens_total",
    },
}
STEP_S, NUM_PLACES = 0.01, 2


@pytest.fixture(scope="module")
def server(start_server) -> Server:
    return start_server("--max-num-seqs", str(NUM_PLACES), FAKE_STEP_S=str(STEP_S)).wait_ready()


def scrape(server: Server) -> dict[str, dict[tuple[str, ...], float]]:
    """Of each metric of ours its samples: by the values of their labels other than the model's name."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    ours = [family for family in families if family.name.startswith("vcli:")]
    assert all(sample.labels["model_name"] for family in ours for sample in family.samples)
    return {
        family.name.removeprefix("vcli:"): {
            (*(value for name, value in sample.labels.items() if name != "model_name"),): sample.value
            for sample in family.samples
            if not sample.name.endswith("_created")
        }
        for family in ours
    }


def complete(server: Server, num_tokens: int, **body: object) -> httpx.Response:
    return server.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": num_tokens, "ignore_eos": True} | body)


def test_every_metric_that_was_promised_is_there_with_its_type(server):
    assert complete(server, 3).status_code == 200
    families = list(text_string_to_metric_families(server.get("/metrics").text))
    types = {family.name: family.type for family in families if family.name.startswith("vcli:")}
    for kind, names in PROMISED.items():
        assert {name: types.get(f"vcli:{name}") for name in names} == dict.fromkeys(names, kind)
    assert all(family.documentation for family in families)
    assert len(types) == len([family for family in families if family.name in types]), "one family for each name"


def test_histograms_begin_at_half_a_millisecond_and_count_requests(server):
    before = scrape(server)["time_to_first_token_seconds"]
    assert complete(server, 4, n=2).status_code == 200
    after = scrape(server)["time_to_first_token_seconds"]
    assert ("0.0005",) in after
    assert after[("+Inf",)] - before[("+Inf",)] == 1


def test_memory_of_a_gpu_is_told_by_kind(server):
    samples = scrape(server)
    assert samples["gpu_memory_bytes"].keys() == {("weights",), ("kv_cache",), ("other",), ("free",)}
    assert sum(samples["gpu_memory_bytes"].values()) == 8 << 30
    assert samples["gpu_memory_fragmentation_perc"] == {(): 0.25}


def test_what_an_autoscaler_looks_at_follows_the_load(server):
    """Six streams where two can run: utilization is 3, and who came now would wait for five to end, two at a time.

    They are thought to take as long as sequences took lately.
    """
    num_streams, num_lately, num_tokens = 6, 4, 25
    idle = scrape(server)
    assert idle["utilization_perc"] == idle["predicted_queue_seconds"] == {(): 0}
    start = time.monotonic()
    for _ in range(num_lately):
        complete(server, num_tokens, n=NUM_PLACES)
    took_s = (time.monotonic() - start) / num_lately
    with httpx.Client(timeout=60) as client:
        body = {"prompt": [5, 6], "max_tokens": 480, "ignore_eos": True, "stream": True}
        request = client.build_request("POST", server.url + "/v1/completions", json=body)
        streams = [client.send(request, stream=True) for _ in range(num_streams)]
        server.wait_until(lambda: server.metric("vcli:num_requests_waiting") == num_streams - NUM_PLACES)
        busy = scrape(server)
        for stream in streams:
            stream.close()
    assert busy["utilization_perc"] == {(): num_streams / NUM_PLACES}
    assert busy["num_requests_running"] == {(): NUM_PLACES}
    num_turns = (num_streams + 1 - NUM_PLACES) / NUM_PLACES
    least_s = 0.7 * num_tokens * STEP_S  # a few short ones were before
    assert num_turns * least_s < busy["predicted_queue_seconds"][()] < num_turns * took_s
    server.wait_until(lambda: scrape(server)["utilization_perc"] == {(): 0})


def test_who_waits_for_an_engine_that_loads_again_is_counted_as_waiting(start_server: StartServer):
    server = start_server(FAKE_STEP_S="0.05", FAKE_LOAD_S="1").wait_ready()
    body = {"prompt": [5, 6], "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 3}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=30) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.engine.kill()
        server.wait_until(lambda: server.get("/ready").status_code == 503)
        samples = scrape(server)
        assert samples["engine_restarts"] == {(): 1}
        assert (samples["num_requests_waiting"], samples["num_requests_running"]) == ({(): 3}, {(): 0})
        server.wait_until(lambda: server.metric("vcli:num_requests_running") == 3)
        assert server.metric("vcli:num_requests_waiting") == 0
