"""How one request wants its tokens drawn. Checked when made, so that nothing downstream checks again."""

from typing import Literal, get_args

import msgspec

Pooling = Literal["last", "mean"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling parameters of one request, with vLLM's names and defaults. Raises ValueError, naming the parameter."""

    n: int = 1
    temperature: float = 1.0  # 0 means greedy
    top_k: int = 0  # 0 or -1: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: up to the model's context
    min_tokens: int = 0
    logprobs: int | None = None  # number of alternatives beside the sampled token
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    pooling: Pooling | None = None  # no tokens, but the prompt's hidden states as one vector: see pooling_params
    grammar: str = ""  # what the answer must look like (engine/grammar.py makes them); it ends where the grammar does
    allowed_token_ids: list[int] | None = None  # no others are drawn
    bad_words: list[str] = []  # texts that the answer does not hold, as far as they are made of their usual tokens
    bad_words_token_ids: list[list[int]] = []  # the same as tokens, filled in by the front doors

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", [self.stop])
        checks: list[tuple[str, bool, str]] = [
            ("n", 1 <= self.n <= MAX_N, f"must be between 1 and {MAX_N}"),
            ("temperature", 0 <= self.temperature <= 100, "must be between 0 and 100"),
            ("top_k", self.top_k >= -1, "must be 0 or -1 (all tokens) or positive"),
            ("top_p", 0 < self.top_p <= 1, "must be in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "must be in [0, 1]"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "must be between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "must be between -2 and 2"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "must be between 0.01 and 100"),
            ("logit_bias", self._logit_bias_is_valid(), "must map token ids to values between -100 and 100"),
            ("logit_bias", len(self.logit_bias or ()) <= MAX_LOGIT_BIAS, f"must name at most {MAX_LOGIT_BIAS} tokens"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "must fit in 64 bits"),
            ("stop", all(self.stop), "must not hold an empty string"),
            ("stop_token_ids", all(token >= 0 for token in self.stop_token_ids), "must not be negative"),
            ("stop_token_ids", len(self.stop_token_ids) <= MAX_STOP_IDS, f"must be at most {MAX_STOP_IDS} tokens"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "must be at least 1"),
            ("min_tokens", self._min_tokens_is_valid(), "must lie between 0 and max_tokens"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"must be 0 to {MAX_LOGPROBS}"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_LOGPROBS,
                f"must be 0 to {MAX_LOGPROBS}",
            ),
            ("pooling", self._pooling_is_valid(), "must be last or mean, for one sequence with max_tokens = 1"),
            ("allowed_token_ids", self._allowed_is_valid(), f"must name 1 to {MAX_ALLOWED:,} tokens"),
            ("bad_words", all(map(str.strip, self.bad_words)), "must not hold an empty string"),
            ("bad_words", len(self.bad_words) <= MAX_BAD_WORDS, f"must be at most {MAX_BAD_WORDS}"),
            ("min_tokens", not (self.min_tokens and self.grammar), "must be 0 beside a grammar, which knows its end"),
            (
                "min_tokens",
                not (self.min_tokens and self.allowed_token_ids is not None),
                "must be 0 beside allowed_token_ids",
            ),
        ]
        for name, is_valid, rule in checks:
            if not is_valid:
                raise ValueError(f"{name} {rule}, got {getattr(self, name)!r}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @property
    def asks_prompt(self) -> bool:
        """It wants to know something of every token of its prompt: all of them must pass through the model."""
        return self.prompt_logprobs is not None or self.pooling == "mean"

    @property
    def has_mask(self) -> bool:
        """Whether some tokens cannot be drawn at some place."""
        return bool(self.grammar or self.allowed_token_ids is not None or self.bad_words_token_ids)

    def _allowed_is_valid(self) -> bool:
        return self.allowed_token_ids is None or 1 <= len(self.allowed_token_ids) <= MAX_ALLOWED

    def _logit_bias_is_valid(self) -> bool:
        return all(token >= 0 and -100 <= bias <= 100 for token, bias in (self.logit_bias or {}).items())

    def _min_tokens_is_valid(self) -> bool:
        return self.min_tokens >= 0 and (self.max_tokens is None or self.min_tokens <= self.max_tokens)

    def _pooling_is_valid(self) -> bool:
        return self.pooling is None or (self.pooling in get_args(Pooling) and (self.n, self.max_tokens) == (1, 1))


def pooling_params(pooling: Pooling) -> SamplingParams:
    """Parameters of a request for the hidden state of its prompt's last token, or for the mean of all of them."""
    return SamplingParams(pooling=pooling, temperature=0.0, max_tokens=1, detokenize=False)


MAX_N = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_IDS = 64
MAX_ALLOWED = 16_384
MAX_BAD_WORDS = 256
MIN_TEMPERATURE = 1e-5  # below it the division overflows bf16's range of useful logits: the draw is greedy anyway
