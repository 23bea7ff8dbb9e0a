"""The same prompts through plain transformers: `generate` on static batches, greedy, in a process of its own.

It starts after the measured one has ended, so that neither memory nor threads are shared. Prompts of a batch are padded
on the left, the batch runs until its longest output is done, and only the tokens that were asked for count: that is
what a static batch costs. Loading is not timed, and one batch warms up.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.child import module_command, module_environment
from engine.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WARM_UP_TOKENS = 8
DEFINITIONS = {
    "baseline": "tokens asked for, per second of transformers' generate on the same prompts, padded static batches one "
    "after the other, same weights, device and number type, loading and warm-up excluded"
}


@dataclass(frozen=True)
class BaselineTask:
    """What the other process is told."""

    path: str  # model folder or GGUF file
    load_format: str
    device: str  # as the engine's flags: auto, cpu or cuda
    dtype: str
    prompts: list[list[int]]
    output_lens: list[int]
    batch_size: int


def run_baseline(task: BaselineTask) -> dict[str, Any]:
    """Run the task in a fresh process; its throughput and what it ran on. Raises UserError when it fails."""
    done = subprocess.run(
        module_command("bench.baseline"),
        input=json.dumps(asdict(task)),
        capture_output=True,
        text=True,
        env=module_environment(),
        check=False,
    )
    if done.returncode:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise UserError(f"the transformers baseline ended with exit code {done.returncode}:\n{last_lines}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def load_transformers(path: Path, load_format: str, device: "torch.device", dtype: "torch.dtype") -> "PreTrainedModel":
    """The model as transformers runs it, on the device and ready to generate."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()
    if load_format == "dummy":
        config = AutoConfig.from_pretrained(path)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    elif path.suffix == ".gguf":
        options = {"gguf_file": path.name, "dtype": dtype}
        if hasattr(transformers, "GgufConfig"):  # later versions keep GGUF weights packed unless told otherwise
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(path.parent, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model = model.to(device).eval()
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    assert next(model.parameters()).dtype == dtype, f"transformers loaded {next(model.parameters()).dtype}"
    torch.set_grad_enabled(False)
    return model


def generate(model: "PreTrainedModel", prompts: list[list[int]], num_tokens: int) -> "torch.Tensor":
    """`num_tokens` greedy tokens for each prompt of one batch.   [len(prompts), num_tokens]"""
    import torch

    longest = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
    )
    return output[:, longest:].cpu()  # the copy waits for the device


def measure(task: BaselineTask) -> dict[str, Any]:
    """Load, warm up, run every batch."""
    import torch
    import transformers

    from engine.model_config import ModelConfig
    from engine.worker import pick_device, pick_dtype

    path = Path(task.path)
    device = pick_device(task.device)
    dtype = pick_dtype(task.dtype, ModelConfig.from_path(path).dtype, device)
    model = load_transformers(path, task.load_format, device, dtype)
    batches = [slice(i, i + task.batch_size) for i in range(0, len(task.prompts), task.batch_size)]
    generate(model, task.prompts[batches[0]], min(WARM_UP_TOKENS, max(task.output_lens)))
    start = time.perf_counter()
    for batch in batches:
        generate(model, task.prompts[batch], max(task.output_lens[batch]))
    duration = time.perf_counter() - start
    num_input, num_output = sum(map(len, task.prompts)), sum(task.output_lens)
    return {
        "engine": f"transformers {transformers.__version__}",
        "batch_size": task.batch_size,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "num_threads": torch.get_num_threads(),
        "duration": duration,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
    }


def main() -> None:
    result = measure(BaselineTask(**json.load(sys.stdin)))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
