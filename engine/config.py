"""Every knob of the engine, once. A field is a flag, a VCLI_* variable and a line of --print-config (vcli/flags.py)."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

BLOCK_SIZE = 16  # tokens a KV block; the kernels are built for it

HIDDEN = {"is_hidden": True}  # metadata of a field that few need: its flag is alive, and not explained by --help


@dataclass(frozen=True)
class EngineConfig:
    """The engine's configuration. Says the same at the end of a run as at its start: measured values travel apart."""

    model: Annotated[str, "local folder, GGUF file or Hugging Face name of the model"] = ""
    tokenizer: Annotated[str, "folder or name of the tokenizer, if not the model's own"] = ""
    revision: Annotated[str, "branch, tag or commit on the hub"] = ""
    load_format: Annotated[
        Literal["auto", "dummy"], "auto reads safetensors or GGUF, dummy makes random weights from config.json"
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"], "number type of weights and activations; auto: the model's"
    ] = "auto"
    quantization: Annotated[
        Literal["auto", "fp8", "int8"],
        "fp8 (e4m3), int8: round weights as they load, inputs token by token; auto: what the checkpoint says",
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], "where to run; auto: a GPU where there is one"] = "auto"
    max_model_len: Annotated[int | None, "longest prompt plus output, in tokens; default: the model's"] = None
    max_num_seqs: Annotated[int, "requests that run in one step at most"] = 256
    max_num_batched_tokens: Annotated[int | None, "tokens in one step at most; 8k on a GPU, 1k on a CPU"] = None
    max_prefill_chunk: Annotated[
        int | None,
        "tokens in a step that prefills beside many decodes, beside few half as many; default: what takes 45 ms",
    ] = field(default=None, metadata=HIDDEN)
    target_itl_s: Annotated[
        float | None, "pause between two tokens of a stream to keep: sizes the prefill chunk beside decodes as they go"
    ] = None
    gpu_memory_utilization: Annotated[float, "share of the GPU's memory to use for weights and KV cache"] = 0.9
    kv_cache_memory: Annotated[int | None, "bytes for the KV cache, instead of what is free"] = None
    host_kv_memory: Annotated[
        int | None, "bytes of the host's memory for KV blocks that the cache has no room for; default: none"
    ] = None
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8"], "number type of the KV cache; fp8 (e4m3) holds twice the tokens, less exactly"
    ] = "auto"
    enable_prefix_caching: Annotated[bool, "share the KV blocks of equal prefixes"] = True
    scheduling_policy: Annotated[
        Literal["fcfs", "priority"],
        "order of requests: smaller numbers in their field priority first (0 unless given), or all by arrival",
    ] = "priority"
    batch_invariant: Annotated[
        bool, "the same output to the last bit alone, in any batch and after a restart; needs a Hopper GPU, costs speed"
    ] = False
    enforce_eager: Annotated[bool, "launch every kernel by itself, without CUDA graphs"] = False
    seed: Annotated[int, "seeds dummy weights and the requests that bring no seed of their own"] = 0
    skip_tokenizer_init: Annotated[bool, "serve token ids only, load no tokenizer"] = field(
        default=False, metadata=HIDDEN
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a number that can mean nothing."""
        limits = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_prefill_chunk")
        for name in (*limits, "kv_cache_memory", "host_kv_memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.host_kv_memory is not None and not self.enable_prefix_caching:
            raise ValueError("host_kv_memory keeps blocks of the prefix cache: leave out --no-enable-prefix-caching")
        if self.max_model_len == 1:
            raise ValueError("max_model_len must be at least 2, a prompt token and an output token, got 1")
        if self.target_itl_s is not None and not self.target_itl_s > 0:
            raise ValueError(f"target_itl_s must be more than 0, got {self.target_itl_s:g}")
        if self.target_itl_s is not None and self.max_prefill_chunk is not None:
            raise ValueError("target_itl_s sizes the prefill chunk: leave max_prefill_chunk out")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit in 64 bits, got {self.seed}")
