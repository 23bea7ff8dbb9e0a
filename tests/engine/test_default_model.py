"""The model that `make serve` runs, against transformers on the same weights."""

import json
import os
import subprocess
import sys

import jsonschema

from engine.grammar import json_grammar
from engine.llm import LLM
from engine.sampling_params import SamplingParams
from tests.engine.random_schemas import random_schema

NUM_SCHEMAS = int(os.environ.get("VCLI_NUM_SCHEMAS", "24"))  # 200 take two minutes on two cores


def test_logits_and_greedy_tokens_of_20_prompts_equal_those_of_transformers(default_model, tmp_path):
    """64 tokens each, prompts of 6 to 400 tokens, batched freely here and one by one there, fp32."""
    report = tmp_path / "parity.json"
    options = ["--device", "cpu", "--dtype", "float32", "--num-prompts", "20", "--max-tokens", "64"]
    run = subprocess.run(
        [sys.executable, "-m", "bench.parity", str(default_model), *options, "--output", str(report)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    prompts = json.loads(report.read_text())["prompts"]
    assert len(prompts) == 20
    assert all(prompt["num_tokens"] == 64 for prompt in prompts)
    assert all(prompt["verdict"] == "equal" for prompt in prompts), [prompt["verdict"] for prompt in prompts]
    assert max(prompt["worst_ulps"] for prompt in prompts) == 0, "each token is the best of transformers' logits too"


def test_answers_at_temperature_1_are_valid_by_random_schemas():
    """Nested objects, enums, arrays, bounds, formats and optional fields, 32 at a time; each ends by itself."""
    llm = LLM("", max_num_seqs=32, kv_cache_memory=1 << 28)
    schemas = [random_schema(seed) for seed in range(NUM_SCHEMAS)]
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=1500, grammar=json_grammar(schema))
        for seed, schema in enumerate(schemas)
    ]
    results = llm.generate(["A record, as JSON:\n"] * NUM_SCHEMAS, params, use_tqdm=False)
    draft = jsonschema.Draft202012Validator
    for schema, result in zip(schemas, results, strict=True):
        [output] = result.outputs
        assert output.finish_reason == "stop", (schema, output.text)
        draft(schema, format_checker=draft.FORMAT_CHECKER).validate(json.loads(output.text))
