"""Prometheus' text format, held against Prometheus' own parser."""

import prometheus_client as prometheus
from prometheus_client.parser import text_string_to_metric_families

from bench.scrape import by_label, totals


def page() -> str:
    registry = prometheus.CollectorRegistry()
    prometheus.ProcessCollector(registry=registry)
    stages = prometheus.Counter("vcli:stage_seconds", "Of {what}.", ["model_name", "stage"], registry=registry)
    for seconds, model, stage in ((1.5, 'a "b" {c}', "idle"), (0.25, "a,b\\", "forward"), (1e9, "a\n} 7", "forward")):
        stages.labels(model, stage).inc(seconds)
    prometheus.Gauge("vcli:num_requests_running", "Without labels.", registry=registry).set(3)
    prometheus.Histogram("vllm:ttft_seconds", "In buckets.", registry=registry).observe(0.3)
    return prometheus.generate_latest(registry).decode()


def test_values_are_summed_over_the_labels_and_go_by_names_without_a_prefix():
    text, expected = page(), dict[str, float]()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            prefix, _, name = sample.name.rpartition(":")
            if prefix in ("vcli", "vllm"):
                expected[name] = expected.get(name, 0.0) + sample.value

    assert totals(text) == expected
    assert expected["stage_seconds_total"] == 1.5 + 0.25 + 1e9
    assert expected["num_requests_running"] == 3.0
    assert "ttft_seconds_bucket" in expected


def test_the_values_of_a_metric_by_a_label():
    assert by_label(page(), "stage_seconds_total", "stage") == {"idle": 1.5, "forward": 0.25 + 1e9}
    assert by_label(page(), "stage_seconds_total", "engine") == {}
    assert by_label(page(), "num_requests_running", "stage") == {}
