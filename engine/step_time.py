"""What a step beside decodes takes: the time of its decodes, and so much more for each token of a prompt.

Both are measured as steps go by, so that whatever the device, the model and the contexts are, a prefill chunk can be
made as large as a pause between two tokens allows.
"""

from engine.recent import MEMORY, RecentMean

DECODE_MEMORY = 8  # steps: requests come and go


class StepTime:
    def __init__(self) -> None:
        self._decode_s = RecentMean(DECODE_MEMORY)  # of steps that only decode
        self._prompt_s = self._num_prompt_tokens = 0.0  # sums over the steps that prefill, too, older ones faded

    def add(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        if not num_decodes:
            return  # a prompt alone takes what it likes
        if not num_prompt_tokens:
            self._decode_s.add(seconds)
            return
        keep = 1 - 1 / MEMORY
        self._prompt_s = keep * self._prompt_s + max(seconds - self._decode_s.value, 0.0)
        self._num_prompt_tokens = keep * self._num_prompt_tokens + num_prompt_tokens

    def prompt_tokens_within(self, seconds: float) -> int | None:
        """Tokens of prompts that a step beside decodes has time for; None if nothing is known yet."""
        if not self._prompt_s:
            return None
        left_s = max(seconds - self._decode_s.value, 0.0)
        return int(left_s * self._num_prompt_tokens / self._prompt_s)
