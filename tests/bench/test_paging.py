"""The comparison of copied KV with KV that is computed again, on a tiny model."""

import json
from pathlib import Path

from bench import paging
from engine.host_cache import HostCache
from tests.bench.results import section_marks, updated_readme

SMALL = ["--input-len", "40", "--output-len", "24", "--prefix-len", "96", "--max-model-len", "256"]
# A cache of 32 blocks of 8 KiB.
CPU = ["--device", "cpu", "--dtype", "float32", "--kv-cache-gib", str(2**-12), "--host-kv-gib", str(2**-9)]


def test_each_kind_of_work_is_done_both_ways_with_the_same_tokens(tiny_checkpoint, monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setattr(HostCache, "seconds_per_block", lambda self: 0.0)
    monkeypatch.setattr(paging, "ROUNDS", 1)
    output = tmp_path / "paging.json"
    assert paging.main([str(tiny_checkpoint("llama")), *CPU, *SMALL, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["facts"]["num_cache_tokens"] == 512
    assert result["num_equal"] == result["num_requests"] == 3 * 512 // 64 + 3 * 512 // 96 + 512 // 2 // 64

    rows = {(row["work"], row["way"]): row for row in result["rows"]}
    assert list(rows) == [(work, way) for work in ("crowd", "return", "steady") for way in paging.WAYS]
    crowd, crowd_with_host, again, again_with_host, _, steady_with_host = rows.values()
    assert crowd["num_preemptions"] > 0
    assert crowd_with_host["num_blocks_paged_out"] > 0
    assert steady_with_host["num_blocks_paged_out"] > 0
    assert crowd["num_blocks_paged_out"] == again["num_blocks_paged_in"] == 0
    assert again["num_prefix_hits"] < again_with_host["num_prefix_hits"] <= again_with_host["num_looked_up"]

    readme = updated_readme(tmp_path, section_marks("results") + section_marks("paging"))
    assert "512 tokens of cache, 4,096 behind it. A block takes 0 us to the host and back" in readme
    assert "| return | from the host | " in readme
    assert f"{result['num_equal']} of {result['num_requests']} requests have the same tokens" in capsys.readouterr().out


def test_an_engine_that_copies_no_faster_than_it_computes_has_nothing_to_compare(tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(HostCache, "seconds_per_block", lambda self: 60.0)
    assert paging.main([str(tiny_checkpoint("llama")), *CPU, *SMALL]) == 1
    assert "--host-kv-memory is not used" in capsys.readouterr().err
