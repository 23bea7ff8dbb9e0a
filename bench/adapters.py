"""How the servers of other projects are started: data, one entry each.

A setting is one of EngineConfig's, so that all engines are told the same; what an engine has no flag for stands beside
its row. Command lines as of vLLM 0.33, SGLang 0.5, LMDeploy 0.16, TensorRT-LLM 1.2 and transformers 5.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import EngineConfig

# What every engine is told where it has a flag for it, whether somebody asked for it or not.
SHARED = ("dtype", "max_model_len", "gpu_memory_utilization", "max_num_seqs")
GPU_ONLY = ("gpu_memory_utilization",)  # without a GPU, if somebody asked for it
# What each engine may differ in without measuring something else.
OWN_AFFAIRS = ("model", "revision", "device", "seed", "tokenizer", "max_prefill_chunk", "scheduling_policy")


@dataclass(frozen=True)
class Adapter:
    """One engine's command line, and how its server wants to be asked."""

    package: str  # the distribution whose version is the engine's
    command: str  # words with {python}, {bin} (the folder of its python), {model} and {port}
    flags: Mapping[str, str | tuple[str, str]]  # setting: its flag; a switch has one to turn it on and one for off
    ready: str = "/health"  # answers 200 once requests can be served
    fields: dict[str, Any] | None = None  # request fields; None: what vLLM and we know is tried
    takes_token_ids: bool = True  # else prompts go as text that makes the same tokens
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # of a setting: our value, its word for it

    def argv(self, engine: EngineConfig, python: str, model: str, port: int, has_gpu: bool) -> list[str]:
        """The whole command."""
        places = {"python": python, "bin": str(Path(python).parent), "model": model, "port": str(port)}
        argv = [word.format(**places) for word in self.command.split()]
        for setting, flag in self.flags.items():
            value, default = getattr(engine, setting), getattr(EngineConfig, setting)
            is_shared = setting in SHARED and (has_gpu or setting not in GPU_ONLY)
            if value in (None, "auto") or (value == default and not is_shared):
                continue
            if isinstance(flag, tuple):
                argv += flag[0 if value else 1].split()
            else:
                argv += [flag, self.words.get(setting, {}).get(str(value), str(value))]
        return argv

    def unsaid(self, engine: EngineConfig) -> list[str]:
        """The settings that differ from the default and that this engine has no flag for."""
        names = set(EngineConfig.__dataclass_fields__) - set(OWN_AFFAIRS) - set(self.flags)
        return sorted(name for name in names if getattr(engine, name) != getattr(EngineConfig, name))

    def version(self, python: str) -> str | None:
        """The installed version; None where it is not installed."""
        code = f"from importlib.metadata import version; print(version({self.package!r}))"
        try:
            done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()


# Never the end of a text before max_tokens, as `ignore_eos` means elsewhere; fields that it refuses are left out.
_TRANSFORMERS_FIELDS = {
    "ignore_eos": None,
    "stream_options": None,
    "generation_config": json.dumps({"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}),
}
ADAPTERS = {
    "vllm": Adapter(
        package="vllm",
        command="{python} -m vllm.entrypoints.openai.api_server --model {model} --host 127.0.0.1 --port {port}",
        flags={
            "dtype": "--dtype",
            "max_model_len": "--max-model-len",
            "gpu_memory_utilization": "--gpu-memory-utilization",
            "max_num_seqs": "--max-num-seqs",
            "max_num_batched_tokens": "--max-num-batched-tokens",
            "load_format": "--load-format",
            "quantization": "--quantization",
            "kv_cache_dtype": "--kv-cache-dtype",
            "enable_prefix_caching": ("--enable-prefix-caching", "--no-enable-prefix-caching"),
            "enforce_eager": ("--enforce-eager", "--no-enforce-eager"),
        },
    ),
    "sglang": Adapter(
        package="sglang",
        command="{python} -m sglang.launch_server --model-path {model} --host 127.0.0.1 --port {port}",
        flags={
            "dtype": "--dtype",
            "max_model_len": "--context-length",
            "gpu_memory_utilization": "--mem-fraction-static",
            "max_num_seqs": "--max-running-requests",
            "load_format": "--load-format",
            "quantization": "--quantization",
            "kv_cache_dtype": "--kv-cache-dtype",
            "enable_prefix_caching": ("", "--disable-radix-cache"),
            "enforce_eager": ("--disable-cuda-graph", ""),
        },
        words={"kv_cache_dtype": {"fp8": "fp8_e4m3"}},
    ),
    "lmdeploy": Adapter(
        package="lmdeploy",
        command="{bin}/lmdeploy serve api_server {model} --server-name 127.0.0.1 --server-port {port}",
        flags={
            "dtype": "--dtype",
            "max_model_len": "--session-len",
            "gpu_memory_utilization": "--cache-max-entry-count",  # of what the weights leave free
            "max_num_seqs": "--max-batch-size",
            "enable_prefix_caching": ("--enable-prefix-caching", ""),
        },
        takes_token_ids=False,
    ),
    "tensorrt-llm": Adapter(
        package="tensorrt_llm",
        command="{bin}/trtllm-serve {model} --host 127.0.0.1 --port {port}",
        flags={
            "max_model_len": "--max_seq_len",
            "gpu_memory_utilization": "--kv_cache_free_gpu_memory_fraction",  # of what the weights leave free
            "max_num_seqs": "--max_batch_size",
            "max_num_batched_tokens": "--max_num_tokens",
        },
    ),
    "transformers": Adapter(
        package="transformers",
        command="{bin}/transformers serve {model} --host 127.0.0.1 --port {port} --continuous-batching",
        flags={"dtype": "--dtype", "device": "--device", "gpu_memory_utilization": "--cb-max-memory-percent"},
        fields=_TRANSFORMERS_FIELDS,
        takes_token_ids=False,
    ),
}


def python_of(environment: Path | None) -> str:
    """The interpreter of a virtual environment; of this one where none is given."""
    return str(environment / "bin" / "python") if environment else sys.executable
