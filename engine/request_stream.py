"""What a caller holds of a request: its tokens as they come.

What always holds: a stream ends once, by its last token, by an abort or by an error, and nothing comes after that.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType

from engine.outputs import OutputDelta, RequestOutput, RequestState


class RequestStream:
    """The tokens of one request as they come: an async iterator of all that is new, and a context that aborts at exit.

    `async with engine.submit(...) as stream: async for deltas in stream: ...`
    """

    def __init__(
        self,
        state: RequestState,
        *,
        on_start: Callable[["RequestStream"], None],
        on_abort: Callable[["RequestStream"], None],
    ) -> None:
        """on_start: called once, when the first token is there or the end has come without one."""
        self.state = state
        self.has_started = False  # it has given a token, or ended
        self._on_start = on_start
        self._on_abort = on_abort
        self._pending: list[OutputDelta] = []
        self._num_running = len(state.sequences)
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> list[OutputDelta]:
        await self.wait()
        if not self._pending:
            raise StopAsyncIteration
        deltas, self._pending = self._pending, []
        return deltas

    async def wait(self) -> None:
        """Return as soon as there is something to read, or the end. Raises what ends the stream before that."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self._num_running == 0:
                return
            self._news.clear()
            await self._news.wait()

    @property
    def is_finished(self) -> bool:
        return self._num_running == 0 or self._error is not None

    async def result(self) -> RequestOutput:
        """Wait for the end, and give the whole."""
        async for _ in self:
            pass
        return self.state.result()

    def abort(self, error: Exception | None = None) -> None:
        """Stop: no more tokens come, and whoever reads gets the error, if there is one, instead of an end.

        The engine forgets the sequences that still run; does nothing at the end.
        """
        if self.is_finished:
            return
        self._num_running = 0
        self._pending = []
        self._error = error
        self._start()
        self._on_abort(self)

    async def __aenter__(self) -> "RequestStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    # For the engine.

    def deliver(self, deltas: list[OutputDelta]) -> bool:
        """Give the reader what is new, unless the request was aborted; True when the last of it is among this."""
        if self._num_running == 0:
            return False
        self._pending += deltas
        self._num_running -= sum(delta.finish_reason is not None for delta in deltas)
        self._start()
        return self._num_running == 0

    def fail(self, error: Exception) -> None:
        """End the stream with this error, after what the reader has not read yet."""
        self._error = error
        self._start()

    def _start(self) -> None:
        """Something is there to be read, or the end."""
        self._news.set()
        if not self.has_started:
            self.has_started = True
            self._on_start(self)
