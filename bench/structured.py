"""What does a grammar cost? Decode steps of the same batch with answers in JSON, and with answers of any form.

    python -m bench.structured --output structured.json

Two engines in this process take turns step by step, with the same prompts at temperature 1, so that what else the
machine does meets both. Only steps that do nothing but decode the whole batch count. Each request has a schema of its
own: the same in kind, with other names, so that none gains by another's states.

Exit codes: bench/command.py; 3 if the steps are slower by more than --max-cost percent.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from bench import command
from bench.report import markdown_table
from engine.config import EngineConfig
from engine.grammar import json_grammar
from engine.messages import AddRequest
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.core import EngineCore

KV_CACHE_BYTES = 256 * 2**20
PROMPT = "A list of people who live in a small town, as JSON, with what they do and like:\n"


def schema(index: int, num_items: int) -> dict[str, Any]:
    """Of a list of objects that is longer than the answers, with strings, numbers, enums and optional fields."""
    item = {
        "type": "object",
        "properties": {
            f"name{index}": {"type": "string", "minLength": 1, "maxLength": 60},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["baker", "farmer", "teacher", f"number {index}"]},
            "score": {"type": "number"},
            "likes": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
            "address": {
                "type": "object",
                "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
                "required": ["street"],
                "additionalProperties": False,
            },
        },
        "required": [f"name{index}", "age", "kind", "address"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "minItems": num_items}


def step_ms(core: "EngineCore", num_requests: int) -> float | None:
    """How long the next step takes, in ms; None for one in which not all requests decode."""
    start = time.perf_counter()
    outputs = core.step()
    took = time.perf_counter() - start
    num_decodes, num_running = core.batch.num_decodes, len(core.batch.requests)
    return took * 1e3 if num_decodes == num_running == len(outputs) == num_requests else None


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The result for its file, and whether the cost is within its limit."""
    from engine.core import EngineCore
    from engine.hub import resolve_model
    from engine.tokenizer import Tokenizer

    config = EngineConfig(
        model=options.model, device=options.device, max_num_seqs=options.batch_size, kv_cache_memory=KV_CACHE_BYTES
    )
    free, bound = EngineCore(config), EngineCore(config)
    prompt = Tokenizer.load(str(resolve_model(options.model))).encode(PROMPT)
    grammars = [json_grammar(schema(index, options.output_len)) for index in range(options.batch_size)]
    bound.worker.grammars.compile(json_grammar(True))  # which loads the tokenizer
    start = time.perf_counter()
    for grammar in grammars:
        bound.worker.grammars.compile(grammar)
    compile_s = time.perf_counter() - start

    times: dict[str, list[float]] = {"any form": [], "JSON": []}
    for seed in range(options.rounds):
        for core, forms in ((free, [""] * options.batch_size), (bound, grammars)):
            for index, form in enumerate(forms):
                core.add(AddRequest(f"{index}", prompt, _params(options, form, seed=1000 * seed + index)))
        while free.has_work or bound.has_work:
            pair = [step_ms(core, options.batch_size) for core in (free, bound)]
            if None not in pair:
                for each, took in zip(times.values(), pair, strict=True):
                    each.append(took or 0.0)
    ratios = sorted(bound_ms / free_ms for free_ms, bound_ms in zip(*times.values(), strict=True))
    cost = 100 * (statistics.median(ratios) - 1)
    rows = [_row(name, taken) for name, taken in times.items()]
    quartiles = [ratios[len(ratios) * quarter // 4] for quarter in (1, 3)]
    print(table(rows))
    print(f"\na step under a grammar takes {cost:+.1f} % (quartiles of {len(ratios)} pairs: {quartiles})")
    result: dict[str, Any] = {
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "rows": rows,
        "cost_percent": cost,
        "quartiles_of_ratios": quartiles,
        "compile_ms_each": 1e3 * compile_s / options.batch_size,
    }
    return result, cost <= options.max_cost


def _params(options: argparse.Namespace, grammar: str, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=1.0, max_tokens=options.output_len, ignore_eos=True, detokenize=False, grammar=grammar, seed=seed
    )


def table(rows: list[dict[str, Any]]) -> str:
    return markdown_table(
        ["answers", "steps", "step p50 ms", "p99"],
        [[row[key] for key in ("answers", "steps", "p50", "p99")] for row in rows],
    )


def _row(name: str, times: list[float]) -> dict[str, Any]:
    ordered = sorted(times)
    return {
        "answers": name,
        "steps": len(ordered),
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[len(ordered) * 99 // 100],
    }


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    return command.run("structured", options.output, partial(measure, options))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command.parser("structured", __doc__, starts_server=False)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output-len", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--max-cost", type=float, default=10.0, help="percent of a step")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
