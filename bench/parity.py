"""Are the tokens right? Greedy tokens of vcli against transformers' on the same weights, device and number type.

    python -m bench.parity [MODEL] --device cuda --dtype bfloat16 --output parity.json

Two things are compared for each prompt: the tokens with those of transformers' `generate`, and every token by itself
with transformers' logits after the same tokens. Where the first differ, the second tell a tie, which rounding decides,
from an error. Exit codes: bench/command.py; 3 for an error.
"""

import math
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bench import command
from bench.free_memory import free_memory
from bench.parity_prompts import PROMPTS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from engine.tokenizer import Tokenizer

# The largest difference of two logits that rounding explains, in units in the last place (ulp) of the larger one: the
# 16-bit types round every layer's output, fp32 only adds in another order.
MAX_TIE_ULPS = {"bfloat16": 4.0, "float16": 8.0, "float32": 64.0}
MANTISSA_BITS = {"bfloat16": 7, "float16": 10, "float32": 23}
KV_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class PromptParity:
    """One prompt's tokens, held against transformers'."""

    prompt: str
    num_prompt_tokens: int
    num_tokens: int
    num_other: int  # tokens of ours that are not transformers' best ones there
    first_difference: int | None  # index of the output token; None: all equal to `generate`
    difference_ulps: float | None  # between the two candidates there, in transformers' logits
    worst_ulps: float  # over all positions: how far our token is below transformers' best one
    worst_position: int
    verdict: str  # "equal", "tie" or "error"


def compare(ours: list[int], theirs: list[int], logits: "torch.Tensor", dtype: str) -> dict[str, Any]:
    """The parity of one prompt. `logits` [len(ours), vocab] are transformers', each row after our tokens before it."""
    best, _ = logits.max(dim=-1)
    gaps = (best - logits[range(len(ours)), ours]).tolist()
    ulps = [gap / ulp(top, dtype) for gap, top in zip(gaps, best.tolist(), strict=True)]
    worst = max(range(len(ours)), key=ulps.__getitem__)
    first = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
    difference = None
    if first is not None:  # the tokens before it are equal, so this row is what `generate` saw too
        gap = abs(float(logits[first, theirs[first]] - logits[first, ours[first]]))
        difference = gap / ulp(float(best[first]), dtype)
    limit = MAX_TIE_ULPS[dtype]
    is_error = ulps[worst] > limit or (difference is not None and difference > limit)
    return {
        "num_tokens": len(ours),
        "num_other": sum(gap > 0 for gap in gaps),
        "first_difference": first,
        "difference_ulps": difference,
        "worst_ulps": ulps[worst],
        "worst_position": worst,
        "verdict": "error" if is_error else "equal" if first is None else "tie",
    }


def ulp(value: float, dtype: str) -> float:
    """The distance from a number to its neighbour in a number type."""
    return float(2.0 ** (math.floor(math.log2(max(abs(value), 2.0**-14))) - MANTISSA_BITS[dtype]))


def run(model: str, *, device: str, dtype: str, num_prompts: int, max_tokens: int) -> dict[str, Any]:
    """Both engines one after the other; the parity of every prompt. Raises UserError."""
    from bench.baseline import load_transformers
    from engine.hub import resolve_model
    from engine.model_config import ModelConfig
    from engine.tokenizer import Tokenizer
    from engine.worker import pick_device, pick_dtype

    path = resolve_model(model)
    target = pick_device(device)
    torch_dtype = pick_dtype(dtype, ModelConfig.from_path(path).dtype, target)
    dtype = str(torch_dtype).removeprefix("torch.")
    tokenizer = Tokenizer.load(str(path))
    prompts = [prompt_token_ids(text, i, tokenizer) for i, text in enumerate(PROMPTS[:num_prompts])]
    ours = vcli_tokens(str(path), prompts, max_tokens, device=target.type, dtype=dtype)
    reference = load_transformers(path, "auto", target, torch_dtype)
    results = []
    for text, prompt, tokens in zip(PROMPTS, prompts, ours, strict=False):
        theirs, logits = transformers_tokens(reference, prompt, tokens)
        parity = compare(tokens, theirs, logits, dtype)
        results.append(PromptParity(prompt=text[:80], num_prompt_tokens=len(prompt), **parity))
    verdicts = [result.verdict for result in results]
    return {
        "model": path.stem,
        "device": str(target),
        "dtype": dtype,
        "max_tokens": max_tokens,
        **{
            name: verdicts.count(verdict)
            for name, verdict in (("equal", "equal"), ("ties", "tie"), ("errors", "error"))
        },
        "max_tie_ulps": MAX_TIE_ULPS[dtype],
        "prompts": [asdict(result) for result in results],
    }


def prompt_token_ids(text: str, index: int, tokenizer: "Tokenizer") -> list[int]:
    """Every second prompt goes through the model's chat template, where it has one."""
    from engine.chat_template import render_chat

    if index % 2 or not tokenizer.chat_template:
        return tokenizer.encode(text)
    messages = [{"role": "user", "content": text}]
    chat = render_chat(tokenizer.chat_template, messages, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    return tokenizer.encode(chat, add_special_tokens=False)


def vcli_tokens(path: str, prompts: list[list[int]], max_tokens: int, *, device: str, dtype: str) -> list[list[int]]:
    """Greedy tokens of all prompts in one batch: the engine mixes them as it does when serving."""

    from engine.llm import LLM
    from engine.sampling_params import SamplingParams

    llm = LLM(path, device=device, dtype=dtype, skip_tokenizer_init=True, kv_cache_memory=KV_CACHE_BYTES)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    del llm
    free_memory()  # before the reference model comes
    return tokens


def transformers_tokens(
    model: "PreTrainedModel", prompt: list[int], ours: list[int]
) -> tuple[list[int], "torch.Tensor"]:
    """What `generate` says to the prompt, and the logits of one pass over the prompt and our tokens."""
    from bench.baseline import generate

    return generate(model, [prompt], len(ours))[0].tolist(), transformers_logits(model, prompt, ours)


def transformers_logits(model: "PreTrainedModel", prompt: list[int], ours: list[int]) -> "torch.Tensor":
    """The logits after the prompt and after each of our tokens but the last, in one pass.   [len(ours), vocab]"""
    import torch

    input_ids = torch.tensor([prompt + ours[:-1]], device=model.device)
    return model(input_ids).logits[0, len(prompt) - 1 :].float().cpu()


def main(arguments: list[str]) -> int:
    parser = command.parser("parity", __doc__, starts_server=False)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["auto", *MANTISSA_BITS], default="auto")
    parser.add_argument(
        "--num-prompts", type=int, default=len(PROMPTS), choices=range(1, len(PROMPTS) + 1), metavar="N"
    )
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args(arguments)

    def measure() -> tuple[dict[str, Any], bool]:
        result = run(
            options.model,
            device=options.device,
            dtype=options.dtype,
            num_prompts=options.num_prompts,
            max_tokens=options.max_tokens,
        )
        print_parity(result)
        return result, not result["errors"]

    return command.run("parity", options.output, measure)


def print_parity(result: dict[str, Any]) -> None:
    print("prompt tokens  tokens  first difference  ulps there  worst ulps  verdict")
    for row in result["prompts"]:
        first = "-" if row["first_difference"] is None else row["first_difference"]
        there = "-" if row["difference_ulps"] is None else f"{row['difference_ulps']:.1f}"
        print(
            f"{row['num_prompt_tokens']:13}  {row['num_tokens']:6}  {first:>16}  {there:>10}  {row['worst_ulps']:10.1f}"
            f"  {row['verdict']}"
        )
    print(
        f"{result['model']}, {result['dtype']} on {result['device']}: {result['equal']} equal, {result['ties']} tied "
        f"(two logits within {result['max_tie_ulps']:g} ulps), {result['errors']} wrong"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
