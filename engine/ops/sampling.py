"""From logits to tokens.

A token depends on its request's logits, parameters, seed and position only, never on who shares the batch: the draw is
argmax(logits + Gumbel noise), the noise a function of (seed, position).
"""

from torch import Tensor

from engine.ops.dispatch import body


def sample(logits: Tensor, lines: Tensor, rows: Tensor, ends: Tensor, token_ids: Tensor) -> Tensor:
    """One token a row, which is also put into its place in token_ids, if it has one.   result [n] int32

    logits [n, vocab_size] float32 (changed in place), lines [max_num_rows, NUM_WORDS] int32 as in sampling_line.py,
    token_ids [max_num_rows, max_len] int32. Row i of the logits is that of the request whose line is lines[rows[i]],
    and whose tokens so far are token_ids[rows[i], :ends[i]] (both int32).

    In this order: logit_bias is added; min_tokens forbids the stop tokens; penalties (repetition over all tokens so
    far, presence and frequency over those of the output); temperature. Then all but these tokens are dropped: those
    that min_p keeps, of them the top_k best, of them the fewest best whose probabilities sum to top_p. Tokens equally
    far behind the best (in steps of 2^-24) are kept or dropped together. Of the rest one is drawn.

    A row has no token where its logits hold NaN or +infinity, or nothing but -infinity: its result is -1, and in its
    place lies 0, for a step that is launched before anybody knows.
    """
    return body(logits).sample(logits, lines, rows, ends, token_ids)


def mask_logits(logits: Tensor, words: Tensor, rows: Tensor) -> None:
    """logits[rows[i], t] = -infinity where bit t % 32 of words[i, t // 32] is 0, in place.

    logits [n, vocab_size] float32, words [m, >= vocab_size / 32] int32, rows [m] int32, none twice.
    """
    assert words.shape[1] * 32 >= logits.shape[1], (words.shape, logits.shape)
    body(logits).mask_logits(logits, words, rows)


def take_best(logits: Tensor, rows: Tensor, ends: Tensor, token_ids: Tensor) -> Tensor:
    """The best token of each row, of equal ones the lowest; -1 and its place as in `sample`."""
    return body(logits).take_best(logits, rows, ends, token_ids)


def logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log probabilities of the given tokens [n], their ranks (1: none is better), and those of the num_top best.

    logits [n, vocab_size] float32, token_ids [n] (-1 counts as 0); results [n] float32, [n], [n, num_top] float32
    falling, [n, num_top].
    """
    return body(logits).logprobs(logits, token_ids, num_top)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [rows, vocab_size] float32: argmax(logits + noise) draws from softmax(logits).

    seeds [rows] int64, positions [rows] (index of the token to draw in its sequence). Same numbers on every device.
    """
    return body(seeds).gumbel_noise(seeds, positions, vocab_size)
