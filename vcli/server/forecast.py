"""How long a new request will take, told from how the ones before it went.

While others wait, sequences end at the engine's pace, and each that ends lets the next one start: who must wait for n
ends waits n times the gap between two. Its prompt takes what prompts of its length took, each token of its answer what
tokens took. All of it forgets, so that it follows the load. What was never seen takes no time: nobody is turned away
for a guess.
"""

from engine.outputs import RequestTimings
from engine.recent import RecentLine, RecentMean


class Forecast:
    """Means over the sequences that ended last."""

    def __init__(self) -> None:
        self.output_tokens = RecentMean()  # of a sequence that was not aborted
        self._token_s = RecentMean()
        self._place_s = RecentMean()  # for which a sequence holds its place in the batch
        self._gap_s = RecentMean()  # between two ends, while others wait
        self._prefill_s = RecentLine()  # by prompt tokens, those in the prefix cache as well: as many will be there
        self._num_running = RecentMean()  # sequences, when one ended
        self._last_end: float | None = None  # since which others have waited

    def note(self, timings: RequestTimings, num_running: int, others_wait: bool) -> None:
        """Learn from a request that has ended, all of its sequences with it. num_running: sequences beside it."""
        if not timings.last_token_time:
            return
        prefill_end = timings.first_token_time or timings.last_token_time  # an embedding is there with its prompt
        num_sequences = max(len(timings.finish_reasons), 1)
        self._num_running.add(num_running + num_sequences, num_sequences)
        self._place_s.add(timings.last_token_time - timings.scheduled_time, num_sequences)
        self._prefill_s.add(timings.num_prompt_tokens, prefill_end - timings.scheduled_time)
        if (num_later := timings.num_output_tokens - num_sequences) > 0:
            decode_s = timings.last_token_time - timings.first_token_time
            self._token_s.add(decode_s * num_sequences / num_later, num_sequences)
        if timings.num_output_tokens and "abort" not in timings.finish_reasons:
            self.output_tokens.add(timings.num_output_tokens / num_sequences, num_sequences)
        if others_wait and self._last_end is not None:
            self._gap_s.add((timings.last_token_time - self._last_end) / num_sequences, num_sequences)
        self._last_end = timings.last_token_time if others_wait else None

    def wait_s(self, num_ends: int, num_places: int) -> float:
        """Until so many of the sequences that are in have ended. num_places: that run at once."""
        return num_ends * (self._gap_s.value if self._gap_s.count else self._place_s.value / num_places)

    def answer_s(self, num_prompt_tokens: int, max_tokens: int | None, num_running: int) -> float:
        """From a sequence's start to its last token, so many running, itself among them.

        Where fewer run than did when it was learned it takes less, in proportion at best: so that some are always let
        in, and it is learned anew.
        """
        load = min(num_running / self._num_running.value, 1.0) if self._num_running.count else 1.0
        return load * (self.prefill_s(num_prompt_tokens) + self.decode_s(max_tokens))

    def prefill_s(self, num_prompt_tokens: int) -> float:
        """From a sequence's start to its first token."""
        return self._prefill_s.at(num_prompt_tokens)

    def decode_s(self, max_tokens: int | None) -> float:
        """From a sequence's first token to its last, if it is as long as others are and no longer than it may."""
        num_tokens = self.output_tokens.value
        if max_tokens is not None:
            num_tokens = min(num_tokens, max_tokens)
        return max(num_tokens - 1, 0.0) * self._token_s.value
