"""Which tokens a request may draw next: those that its grammar, its allowed_token_ids and its bad_words leave.

A mask follows its request token by token, on the host. All that it knows follows from the parameters and the output
tokens, so that a request that was preempted, or goes on in another engine, gets it again from these.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine.grammar import GrammarError
from engine.grammar_compiler import CompiledGrammar, failure_of, is_worn_out
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher

BITS = 32  # tokens a word
ALL = np.uint32(2**32 - 1)


def num_words(vocab_size: int) -> int:
    """Words of a mask, with a bit for each token: the lowest of the first word is token 0's."""
    return -(-vocab_size // BITS)


class TokenMask:
    """The tokens that one request may draw next. `error` says why it cannot go on."""

    def __init__(
        self, params: SamplingParams, grammar: CompiledGrammar | None, output_token_ids: Sequence[int], vocab_size: int
    ) -> None:
        self.is_ended = False  # the grammar allows nothing more, or there is an error
        self.error = ""
        self._grammar = grammar
        self._matcher: LLMatcher | None = grammar.matcher() if grammar is not None else None
        self._num_renewals = grammar.num_renewals if grammar is not None else 0
        self._is_renewed = False
        self._taken: list[int] = []  # by the matcher
        self._static = _static_words(params, vocab_size)
        self._sequences = [words for words in params.bad_words_token_ids if len(words) > 1]
        self._last: list[int] = []  # output tokens, as many as the longest bad word has
        for token_id in output_token_ids:
            self.take(token_id)

    def take(self, token_id: int) -> None:
        """Go on behind a token of the request."""
        if self._sequences:
            self._last = [*self._last, token_id][-max(map(len, self._sequences)) :]
        if self._matcher is not None and not self.is_ended:
            self._taken.append(token_id)
            if not self._matcher.consume_token(token_id) and not self._renew():
                self._fail(failure_of(self._matcher))
            self.is_ended = self._matcher.is_stopped()

    def fill(self, words: np.ndarray) -> None:
        """Write the mask of the next token.   words [num_words(vocab_size)] uint32, contiguous"""
        if self._matcher is None:
            words.fill(ALL)
        else:
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            if self._matcher.is_error():
                if self._renew():
                    self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
                if reason := failure_of(self._matcher):
                    self._fail(reason)
        if self._static is not None:
            words &= self._static
        for *before, last in self._sequences:
            if self._last[-len(before) :] == before:
                words[last // BITS] &= ~np.uint32(1 << last % BITS)
        if not self.error and not words.any():
            self._fail("no token is left that it, allowed_token_ids and bad_words all allow")

    def _renew(self) -> bool:
        """Go on with the grammar compiled anew, once, if it is worn out; whether that has helped."""
        assert self._matcher is not None
        assert self._grammar is not None
        if self._is_renewed or not is_worn_out(self._matcher):
            return False
        self._is_renewed = True
        try:
            self._grammar.renew(self._num_renewals)
        except GrammarError:  # on a busy machine it may be over its limits, which it was not at first
            return False
        self._matcher = self._grammar.matcher()
        return self._matcher.consume_tokens(self._taken)

    def _fail(self, reason: str) -> None:
        self.is_ended = True
        self.error = self.error or reason


def _static_words(params: SamplingParams, vocab_size: int) -> np.ndarray | None:
    """The part of a mask that is the same for all tokens."""
    single = [words[0] for words in params.bad_words_token_ids if len(words) == 1]
    if params.allowed_token_ids is None and not single:
        return None
    bits = np.zeros(num_words(vocab_size) * BITS, np.uint8)
    bits[slice(vocab_size) if params.allowed_token_ids is None else params.allowed_token_ids] = 1
    bits[single] = 0
    return np.packbits(bits, bitorder="little").view(np.uint32)
