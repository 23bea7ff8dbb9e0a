"""What grammars cost, measured on a model of random weights."""

import json

from bench import structured


def test_steps_under_a_grammar_are_compared_with_free_ones(tiny_checkpoint, tmp_path, capsys):
    output = tmp_path / "structured.json"
    options = ["--device", "cpu", "--batch-size", "3", "--output-len", "12", "--rounds", "2", "--max-cost", "1e6"]
    assert structured.main([str(tiny_checkpoint("llama")), *options, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    free, bound = result["rows"]
    assert (free["answers"], bound["answers"]) == ("any form", "JSON")
    assert free["steps"] == bound["steps"] == 2 * 11, "all but the first, which has the prompts"
    assert result["cost_percent"] > -100
    assert "a step under a grammar takes" in capsys.readouterr().out


def test_a_cost_beyond_the_limit_fails(tiny_checkpoint):
    options = ["--device", "cpu", "--batch-size", "1", "--output-len", "4", "--rounds", "1", "--max-cost", "-1000"]
    assert structured.main([str(tiny_checkpoint("llama")), *options]) == 3
