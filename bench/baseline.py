"""The same prompts through plain transformers: `generate` on static batches, greedy, in a process of its own.

Prompts of a batch are padded on the left, the batch runs until its longest output is done, and only the tokens that
were asked for count: that is what a static batch costs. Loading is not timed, and one batch warms up.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.child import die_with_parent, module_command, module_environment
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
class BaselineModel:
    """What the other process loads."""

    path: str  # model folder or GGUF file
    load_format: str
    device: str  # as the engine's flags: auto, cpu or cuda
    dtype: str


@dataclass(frozen=True)
class BaselineTask:
    """What it generates, each time it is asked."""

    prompts: list[list[int]]
    output_lens: list[int]
    batch_size: int


@contextlib.contextmanager
def running_baseline(model: BaselineModel) -> Iterator[Callable[[BaselineTask], dict[str, Any]]]:
    """A fresh process with the model loaded: from a task to its throughput and what it ran on.

    Raises UserError with its last words when it fails.
    """
    with tempfile.TemporaryFile("w+", prefix="vcli-baseline-", errors="replace") as log:
        process = subprocess.Popen(
            module_command("bench.baseline"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=module_environment(),
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the other
            preexec_fn=die_with_parent,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def ask(question: Any) -> dict[str, Any]:
            with contextlib.suppress(BrokenPipeError):  # what it died of is told below
                print(json.dumps(asdict(question)), file=questions, flush=True)
            if answer := answers.readline():
                return dict(json.loads(answer))
            exit_code = process.wait()
            log.seek(0)
            last_lines = "\n".join(log.read().strip().splitlines()[-3:])
            raise UserError(f"the transformers baseline ended with exit code {exit_code}:\n{last_lines}")

        try:
            ask(model)
            yield ask
        finally:
            process.kill()
            process.wait()


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


def load(baseline: BaselineModel) -> "PreTrainedModel":
    """Raises whatever transformers does."""
    from engine.model_config import ModelConfig
    from engine.worker import pick_device, pick_dtype

    path, device = Path(baseline.path), pick_device(baseline.device)
    dtype = pick_dtype(baseline.dtype, ModelConfig.from_path(path).dtype, device)
    return load_transformers(path, baseline.load_format, device, dtype)


def measure(model: "PreTrainedModel", task: BaselineTask) -> dict[str, Any]:
    """Run every batch."""
    import torch
    import transformers

    batches = [slice(i, i + task.batch_size) for i in range(0, len(task.prompts), task.batch_size)]
    start = time.perf_counter()
    for batch in batches:
        generate(model, task.prompts[batch], max(task.output_lens[batch]))
    duration = time.perf_counter() - start
    num_input, num_output = sum(map(len, task.prompts)), sum(task.output_lens)
    return {
        "engine": f"transformers {transformers.__version__}",
        "batch_size": task.batch_size,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_threads": torch.get_num_threads(),
        "duration": duration,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
    }


def main() -> None:
    """A line in, a line out: the model, then the tasks. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    model = load(BaselineModel(**json.loads(sys.stdin.readline())))
    print("{}", file=answers, flush=True)
    is_warm = False
    for line in sys.stdin:
        task = BaselineTask(**json.loads(line))
        if not is_warm:
            generate(model, task.prompts[: task.batch_size], min(WARM_UP_TOKENS, max(task.output_lens)))
            is_warm = True
        print(json.dumps(measure(model, task)), file=answers, flush=True)


if __name__ == "__main__":
    main()
