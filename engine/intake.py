"""What both front doors do to a request before the engine sees it: check it, close what it left open, fan it out.

After this the engine needs no defence: every token id exists, the prompt leaves room for an answer, and seed and
max_tokens are set, so that the same request can be run again and give the same tokens.
"""

import hashlib
import random
import time

import msgspec

from engine.messages import AddRequest, Ready
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer


def make_requests(
    request_id: str,
    prompt_token_ids: list[int],
    params: SamplingParams,
    *,
    ready: Ready,
    tokenizer: Tokenizer | None,
    seeds: random.Random,
    priority: int = 0,
    cache_salt: str = "",
) -> list[AddRequest]:
    """One AddRequest for each of the n sequences asked for; the later ones follow the first. Raises ValueError."""
    check_prompt(prompt_token_ids, ready)
    check_token_ids("stop_token_ids holds token", params.stop_token_ids, ready.vocab_size)
    check_token_ids("logit_bias names token", list(params.logit_bias or ()), ready.vocab_size)
    check_token_ids("allowed_token_ids holds token", params.allowed_token_ids or [], ready.vocab_size)
    if params.stop and not (tokenizer and params.detokenize):
        raise ValueError("stop strings need text, and this request gives token ids only: use stop_token_ids")
    if (params.grammar or params.bad_words) and tokenizer is None:
        name = "a grammar" if params.grammar else "bad_words"
        raise ValueError(f"{name} needs the tokenizer, and --skip-tokenizer-init left it out")
    room = ready.max_model_len - len(prompt_token_ids)
    max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    seed = seeds.getrandbits(63) if params.seed is None else params.seed
    bad_words_token_ids = tokens_of_words(params.bad_words, tokenizer) if tokenizer and params.bad_words else []
    request_ids = [request_id] if params.n == 1 else [f"{request_id}-{index}" for index in range(params.n)]
    arrival_time = time.monotonic()
    return [
        AddRequest(
            request_id=each_id,
            prompt_token_ids=prompt_token_ids,
            params=msgspec.structs.replace(
                params,
                n=1,
                max_tokens=max_tokens,
                min_tokens=min(params.min_tokens, max_tokens),
                seed=seed_of(seed, index),
                prompt_logprobs=None if index else params.prompt_logprobs,
                bad_words_token_ids=bad_words_token_ids,
            ),
            priority=priority,
            cache_salt=cache_salt,
            leader_id=request_ids[0] if index else "",
            arrival_time=arrival_time,
        )
        for index, each_id in enumerate(request_ids)
    ]


def check_prompt(prompt_token_ids: list[int], ready: Ready) -> None:
    if not prompt_token_ids:
        raise ValueError("the prompt is empty: send at least one token")
    if len(prompt_token_ids) > ready.max_model_len - 1:
        raise ValueError(
            f"prompt has {len(prompt_token_ids):,} tokens and --max-model-len is {ready.max_model_len:,}: "
            "shorten it or raise the limit"
        )
    check_token_ids("the prompt holds token", prompt_token_ids, ready.vocab_size)


def check_token_ids(where: str, token_ids: list[int], vocab_size: int) -> None:
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
    raise ValueError(f"{where} {wrong:,}, and the model's tokens are 0 to {vocab_size - 1:,}")


def tokens_of_words(words: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """What words are made of at the beginning of a text, and behind a space."""
    texts = [text for word in words for text in (word.lstrip(), " " + word.lstrip())]
    found = map(tuple, tokenizer.encode_batch(texts, add_special_tokens=False))
    return [list(token_ids) for token_ids in dict.fromkeys(found) if token_ids]


def seed_of(seed: int, index: int) -> int:
    """The seed of one of a request's n sequences: the first keeps the request's own."""
    if index == 0:
        return seed
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
