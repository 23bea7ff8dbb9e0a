"""Bytes and FLOPs of a step, counted by hand for a model small enough for it."""

from dataclasses import replace

import pytest

from bench.ceilings import Ceilings
from bench.work import ModelWork, Work
from engine.batch import ScheduledRequest
from engine.model_config import ModelConfig
from engine.quantization.weight import Scheme

# 3 layers, 2 heads of 4 and 1 KV head, hidden size 8, inner size 6, vocabulary of 10; 2 bytes a number.
MODEL = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=10, hidden_size=8, intermediate_size=6, num_layers=3, num_heads=2,
    num_kv_heads=1, head_dim=4, max_model_len=64, dtype="bfloat16", eos_token_ids=(), tie_word_embeddings=True,
    layer_windows=(0, 0, 0), layer_ropes=(None,) * 3, rms_norm_eps=1e-5, activation="silu",
)  # fmt: skip
WORK = ModelWork(MODEL, "bfloat16", "bfloat16")


def decode(context: int) -> ScheduledRequest:
    """One token in, which is the last of `context`, and one out."""
    return ScheduledRequest(0, context - 1, 1, True, [])


def test_a_decode_reads_every_weight_once_and_its_own_keys_and_values():
    parts = WORK.step([decode(5), decode(7)])

    # qkv: 16 x 8 weights in each of 3 layers; 2 tokens of 8 numbers in, of 16 out.
    assert parts["qkv"] == Work(2 * 3 * (16 * 8 + 2 * 8), 2 * 3 * 2 * 16, 2 * 3 * 2 * 16 * 8)
    assert parts["o"] == Work(2 * 3 * (8 * 8 + 2 * 8), 2 * 3 * 2 * 8, 2 * 3 * 2 * 8 * 8)
    # gate_up: 12 x 8 weights; of 12 results 6 are left after the activation.
    assert parts["gate_up"] == Work(2 * 3 * (12 * 8 + 2 * 8), 2 * 3 * 2 * 6, 2 * 3 * 2 * 12 * 8)
    assert parts["activation"] == Work(2 * 3 * 2 * 12, 2 * 3 * 2 * 6)
    assert parts["down"] == Work(2 * 3 * (8 * 6 + 2 * 6), 2 * 3 * 2 * 8, 2 * 3 * 2 * 8 * 6)
    # attention: 5 and 7 keys and as many values of 4 numbers, beside 2 queries and results of 8; two products each.
    assert parts["attention"] == Work(2 * 3 * (12 * 2 * 4 + 2 * 8), 2 * 3 * 2 * 8, 3 * 2 * 2 * 12 * 8)
    # Norms: 2 in each layer and a last one, 2 numbers in and 2 out of 8 numbers of 2 tokens.
    assert parts["norm"] == Work(7 * 2 * 2 * 2 * 8, 7 * 2 * 2 * 2 * 8)
    assert parts["rotary and KV write"] == Work(2 * 3 * 2 * 16, 2 * 3 * 2 * 16)
    # logits are float32, and drawing reads them.
    assert parts["logits"] == Work(2 * (10 * 8 + 2 * 8), 4 * 2 * 10, 2 * 2 * 10 * 8)
    assert parts["sampling"] == Work(4 * 2 * 10)


def test_a_chunk_that_draws_nothing_ends_with_the_last_layers_attention():
    chunk = ScheduledRequest(0, 4, 3, False, [])  # tokens 5, 6, 7 of a prompt

    parts = WORK.step([chunk])

    assert parts["qkv"].flops == 2 * 3 * 3 * 16 * 8  # three layers
    assert parts["down"].flops == 2 * 2 * 3 * 8 * 6  # two
    assert parts["attention"].flops == 3 * 2 * 2 * (5 + 6 + 7) * 8
    assert parts["attention"].read == 2 * 3 * (7 * 2 * 4 + 3 * 8)  # seven keys and values, once for all three
    assert "logits" not in parts
    assert "sampling" not in parts


def test_a_prompts_end_draws_one_token():
    parts = WORK.step([ScheduledRequest(0, 0, 3, True, [])])

    assert parts["down"].flops == 2 * (3 + 3 + 1) * 8 * 6
    assert parts["logits"].flops == 2 * 1 * 10 * 8


@pytest.mark.parametrize(("start", "num_tokens", "window"), [(0, 9, 4), (2, 5, 4), (6, 3, 4), (0, 4, 4), (9, 1, 4)])
def test_a_window_cuts_off_what_is_seen(start: int, num_tokens: int, window: int):
    work = ModelWork(replace(MODEL, layer_windows=(window,) * 3), "bfloat16", "bfloat16")
    queries = range(start, start + num_tokens)
    seen = [set(range(max(0, query + 1 - window), query + 1)) for query in queries]

    attention = work.step([ScheduledRequest(0, start, num_tokens, True, [])])["attention"]

    assert attention.flops == 3 * 2 * 2 * 8 * sum(map(len, seen))
    assert attention.read == 3 * 2 * (2 * 4 * len(set().union(*seen)) + 8 * num_tokens)


def test_few_bits_are_less_to_read_and_as_much_to_multiply():
    plain = WORK.step([decode(5)])
    int4 = ModelWork(MODEL, "bfloat16", "fp8", Scheme("int", 4, (1, 4))).step([decode(5)])

    # 4 bits, and 16 for the scale of 4 of them: 8 bits in all, half of what plain weights take.
    assert plain["down"].read - int4["down"].read == 3 * 8 * 6
    assert int4["down"].flops == plain["down"].flops
    assert plain["attention"].read - int4["attention"].read == 3 * 5 * 2 * 4
    assert plain["logits"] == int4["logits"]


def test_the_least_time_is_that_of_what_binds():
    ceilings = Ceilings(read_bytes_per_s=100.0, copied_bytes_per_s=50.0, flops_per_s=10.0)

    # 30 bytes read beside what is copied: 10 in and 10 out.
    assert Work(40.0, 10.0, 1.0).seconds(ceilings) == 20 / 50 + 30 / 100
    assert Work(40.0, 10.0, 100.0).seconds(ceilings) == 10.0
