"""A whole model's logits: ours, however the prompt is cut and the cache is laid out, and transformers'."""

from pathlib import Path

import torch
import transformers
from torch import Tensor

from engine.batch import ForwardBatch
from engine.config import BLOCK_SIZE
from engine.models import Model


def transformers_logits(path: Path, token_ids: Tensor) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    with torch.inference_mode():
        return model(token_ids.unsqueeze(0)).logits[0]


def run(model: Model, token_ids: Tensor, chunks: list[int]) -> Tensor:
    """The logits of all tokens, given chunk by chunk to a request whose blocks lie scattered in the cache."""
    block_table = torch.tensor([[0, 0, 0], [5, 2, 7]], dtype=torch.int32)  # the request is in row 1
    for attention in model.attentions:
        shape = (9, attention.num_kv_heads, BLOCK_SIZE, attention.head_dim)
        attention.k_cache, attention.v_cache = torch.full(shape, 1e4), torch.full(shape, 1e4)  # what was there before
    logits, start = [], 0
    with torch.inference_mode():
        for num_tokens in chunks:
            batch = one_request(token_ids, start, num_tokens, block_table)
            logits.append(model.logits(model.forward(batch)))
            start += num_tokens
    return torch.cat(logits)


def one_request(token_ids: Tensor, start: int, num_tokens: int, block_table: Tensor) -> ForwardBatch:
    positions = torch.arange(start, start + num_tokens, dtype=torch.int32)
    blocks = block_table[1, (positions // BLOCK_SIZE).long()]
    end = start + num_tokens
    return ForwardBatch(
        token_ids=token_ids[start:end].int(),
        positions=positions,
        slot_mapping=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
        query_start=torch.tensor([0, num_tokens], dtype=torch.int32),
        context_lens=torch.tensor([end], dtype=torch.int32),
        rows=torch.tensor([1], dtype=torch.int32),
        block_table=block_table,
        num_decodes=int(num_tokens == 1),
        max_query_len=num_tokens,
        max_context_len=end,
    )
