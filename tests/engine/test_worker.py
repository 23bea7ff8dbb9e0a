"""What a GPU's worker has done by the time it is ready. Needs a GPU."""

import pytest
import torch

from engine.llm import LLM
from engine.ops import launcher
from engine.ops.compiler import Build
from engine.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ALL_KINDS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=40, min_p=0.01),
    SamplingParams(presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.2, logit_bias={5: 1.0}),
    SamplingParams(n=3, logprobs=4, prompt_logprobs=2),
]


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"kv_cache_dtype": "fp8"}, {"batch_invariant": True}])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_no_kernel_is_compiled_while_serving(family, options, tiny_checkpoint, monkeypatch):
    memory = {"kv_cache_memory": 16 << 20, "max_num_seqs": 16, "max_num_batched_tokens": 256}
    llm = LLM(str(tiny_checkpoint(family, dtype="bfloat16")), device="cuda", **memory, **options)

    def refuse(build: Build) -> bytes:
        raise AssertionError(f"{build} was not ready")

    monkeypatch.setattr(launcher, "cubin", refuse)
    prompts = [{"prompt_token_ids": [7 + i] * length} for i, length in enumerate((1, 5, 16, 40, 300, 400))]
    for params in ALL_KINDS:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert len(outputs) == len(prompts)
