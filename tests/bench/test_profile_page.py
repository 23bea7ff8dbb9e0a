"""The page of a profile, and of a server that was watched."""

import html.parser
from dataclasses import replace

from bench.advice import Check
from bench.closed_loop import Run, Step
from bench.profile import IDLE, Part
from bench.profile_page import to_html
from bench.profile_report import Report, describe, part_table, sentences, to_result
from bench.watch import Scrape, Watched, stage_table
from bench.watch import to_result as watched_result
from tests.bench.profiles import make_profile, part

ENVIRONMENT = {"gpu": "NVIDIA <H200>", "date": "2026-11-23T10:00:00", "command": "vcli profile a&b"}


class Words(html.parser.HTMLParser):
    """What a reader sees, element by element; and whether every element ends."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "line", "rect", "circle", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data.strip())


def make_report() -> Report:
    steps = [Step(i / 10, 64 - i, 100 * i, 64 - i, 0, 64, i, i // 8, 0.1 * i % 1, 0.03) for i in range(20)]
    run = Run(steps, seconds=2.0, stage_seconds={"schedule": 0.2, "forward": 0.3, "wait": 1.5})
    parts = part("gate_up", 0.6), part("attention", 0.3), Part(IDLE, 1000, 0.1, 0)
    report = Report.of(make_profile(*parts, run=run, environment=ENVIRONMENT))
    return replace(report, checked=report.first_to_try, check=Check(100.0, 150.0))


def test_a_profiles_page_says_what_it_comes_to_and_shows_why():
    report = make_report()
    tables = [("", part_table(report.profile))]

    page = to_html(to_result(report), describe(report.profile), tables, sentences(report))
    seen = Words(page)

    assert not seen.open
    assert any(words.startswith("The bottleneck is a KV cache too small for 64 requests") for words in seen.words)
    assert "Tried: 100 → 150 tok/s (+50%): it helps." in seen.words
    for words in (
        "A step, by part (%)",
        "Tokens in a step",
        "Requests",
        "KV cache (%)",
        "Preemptions so far",
        "Memory (MB)",
    ):
        assert words in seen.words
    assert any("at 80% of its ceiling" in words for words in seen.words)
    assert "vcli profile a&b" in seen.words
    assert "<script" not in page
    assert "NVIDIA <H200>" not in page


def test_a_watched_servers_page_has_what_can_be_seen_from_outside():
    gauges = {"num_requests_running": 3.0, "kv_cache_usage_perc": 0.4, "iteration_tokens_total_count": 5.0}
    scrapes = [Scrape(float(i), gauges, {"forward": float(i)}) for i in range(4)]
    watched = Watched("http://here", scrapes)
    result = watched_result(watched)

    seen = Words(to_html(result, "http://here · quiet", [("", stage_table(watched))], ["Nothing stands out."]))

    assert "Where the time goes: http://here" in seen.words
    assert "The engine's thread, by stage (%)" in seen.words
    assert "Requests" in seen.words
    assert "Memory (MB)" not in seen.words
    assert "A step, by part (%)" not in seen.words
