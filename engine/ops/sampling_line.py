"""A running request's sampling parameters as a line of 32-bit words: in a table on the device, one line a row.

A header, then the tokens that min_tokens forbids for a while, then pairs of a token and its logit_bias. A line of zeros
takes the best token.
"""

import math
from dataclasses import dataclass
from struct import Struct

import numpy as np

from engine.sampling_params import MAX_LOGIT_BIAS, SamplingParams

STEPS_PER_NAT = 2**24  # distances behind the best logit are whole steps
OUT_OF_REACH = 2**30  # steps: what lies so far behind (e^-64) has no part in anything
MAX_FORBIDDEN = 128
HEADER = np.dtype(
    [  # as in kernels/sampling.cu
        ("inverse_temperature", np.float32),  # 0: the best token is taken
        ("top_p", np.float32),
        ("top_k", np.int32),  # 0: all
        ("max_steps", np.int32),  # min_p, as the steps that a token may lie behind the best
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("num_prompt_tokens", np.int32),
        ("min_tokens", np.int32),
        ("num_forbidden", np.int32),
        ("num_biased", np.int32),
        ("has_penalties", np.int32),
        ("seed", np.int64),
    ]
)
FIELDS = HEADER.names or ()
HEADER_STRUCT = Struct("".join(HEADER[name].char for name in FIELDS))  # numpy takes several times as long to fill one
HEADER_WORDS = HEADER.itemsize // 4
NUM_WORDS = HEADER_WORDS + MAX_FORBIDDEN + 2 * MAX_LOGIT_BIAS


@dataclass(frozen=True)
class Line:
    """A line taken apart again."""

    header: np.void  # fields as in HEADER
    forbidden: np.ndarray  # token ids
    biased: np.ndarray  # token ids
    biases: np.ndarray  # float32

    @property
    def changes_logits(self) -> bool:
        return bool(self.header["num_forbidden"] or self.header["num_biased"] or self.header["has_penalties"])


def pack(params: SamplingParams, num_prompt_tokens: int, stop_ids: list[int]) -> np.ndarray:
    """The words of a line, int32, as many as it needs. stop_ids: what min_tokens forbids."""
    assert len(stop_ids) <= MAX_FORBIDDEN, stop_ids
    forbidden = stop_ids if params.min_tokens else []
    bias = params.logit_bias or {}
    values = {
        "inverse_temperature": 0.0 if params.is_greedy else 1 / params.temperature,
        "top_p": params.top_p,
        "top_k": min(max(params.top_k, 0), 2**31 - 1),
        "max_steps": int(min(OUT_OF_REACH - 1, -math.log(params.min_p) * STEPS_PER_NAT if params.min_p else math.inf)),
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "num_prompt_tokens": num_prompt_tokens,
        "min_tokens": params.min_tokens,
        "num_forbidden": len(forbidden),
        "num_biased": len(bias),
        "has_penalties": params.has_penalties,
        "seed": params.seed or 0,
    }
    header = np.frombuffer(bytearray(HEADER_STRUCT.pack(*(values[name] for name in FIELDS))), np.int32)
    if not forbidden and not bias:
        return header
    pairs = np.empty((len(bias), 2), np.int32)
    pairs[:, 0] = list(bias)
    pairs[:, 1] = np.array(list(bias.values()), np.float32).view(np.int32)
    return np.concatenate([header, np.array(forbidden, np.int32), pairs.ravel()])


def unpack(words: np.ndarray) -> Line:
    header = words[:HEADER_WORDS].view(HEADER)[0]
    first_pair = HEADER_WORDS + int(header["num_forbidden"])
    pairs = words[first_pair : first_pair + 2 * int(header["num_biased"])].reshape(-1, 2)
    return Line(header, words[HEADER_WORDS:first_pair], pairs[:, 0], pairs[:, 1].copy().view(np.float32))
