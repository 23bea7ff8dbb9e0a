"""The responses that can be asked for again: in memory, so many of them and for so long.

What always holds: a response is its tenant's alone, and to everybody else it is not there. When there is no more room,
the oldest goes of the tenant that takes most of it, so that nobody pushes out what others have stored; one that is
still being made stays.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from vcli.server.bodies import MAX_BODY_BYTES
from vcli.server.protocol import ApiError
from vcli.server.replay import Replay
from vcli.server.responses.protocol import InputItem

MAX_RESPONSES = 10_000
MAX_BYTES = 256 << 20  # of conversations and answers; what is kept of streams is counted in replay.py
MAX_AGE_S = 24 * 3600.0
ENTRY_BYTES = 1024  # that an entry takes by itself, about


@dataclass
class Stored:
    """One response: the conversation that led to it, and itself."""

    id: str
    owner: str  # the tenant
    items: bytes  # JSON: what came before the answer, item by item
    body: Callable[[], bytes] | bytes  # the response as clients see it; a function as long as it is being made
    replay: Replay | None = None  # its events and its task, if it is made in the background
    since: float = 0.0  # by time.monotonic(); when it was stored
    num_bytes: int = 0

    @property
    def is_running(self) -> bool:
        return not isinstance(self.body, bytes)

    def json(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else self.body()

    def input_items(self) -> list[InputItem]:
        return _ITEMS.decode(self.items)

    def conversation(self) -> list[InputItem]:
        """All items up to and with the answer, which another response may go on from. Raises ApiError while it runs."""
        if not isinstance(self.body, bytes):
            message = f"the response {self.id!r} is not done yet: wait for it, then go on from it"
            raise ApiError(400, message, param="previous_response_id", code="response_in_progress")
        if len(self.items) > MAX_BODY_BYTES:
            message = (
                f"the conversation before {self.id!r} is larger than {MAX_BODY_BYTES >> 20} MiB: begin another one"
            )
            raise ApiError(400, message, param="previous_response_id", code="context_length_exceeded")
        return self.input_items() + _OUTPUT.decode(self.body).output


class _Output(msgspec.Struct):
    output: list[InputItem]


_ITEMS = msgspec.json.Decoder(list[InputItem])
_OUTPUT = msgspec.json.Decoder(_Output)


class ResponseStore:
    """Owns the responses of all tenants, in the order in which they were stored."""

    def __init__(self) -> None:
        self._by_id: dict[str, Stored] = {}
        self._num_bytes: Counter[str] = Counter()  # by tenant

    def __contains__(self, response_id: str) -> bool:
        return response_id in self._by_id

    def put(self, stored: Stored) -> None:
        """Keep a response, or what has become of one that is kept already."""
        before = self._by_id.pop(stored.id, None)
        if before is not None:
            self._num_bytes[stored.owner] -= before.num_bytes
        body_bytes = len(stored.body) if isinstance(stored.body, bytes) else 0
        stored.num_bytes = ENTRY_BYTES + len(stored.items) + body_bytes
        stored.since = time.monotonic()
        self._by_id[stored.id] = stored
        self._num_bytes[stored.owner] += stored.num_bytes
        self._make_room()

    def find(self, response_id: str, owner: str, param: str = "response_id") -> Stored:
        """Raises ApiError for one that is not there, not any more, or somebody else's."""
        self._drop_old()
        stored = self._by_id.get(response_id)
        if stored is None or stored.owner != owner:
            message = (
                f"there is no response {response_id[:100]!r}: it was not stored (store: false), was deleted, or had "
                f"to make room (responses stay for {MAX_AGE_S / 3600:g} hours at most)"
            )
            raise ApiError(404, message, param=param, code="response_not_found")
        return stored

    def remove(self, stored: Stored) -> None:
        """Forget a response. One that is being made ends."""
        if self._by_id.pop(stored.id, None) is None:
            return
        self._num_bytes[stored.owner] -= stored.num_bytes
        if not self._num_bytes[stored.owner]:
            del self._num_bytes[stored.owner]
        if stored.replay is not None:
            stored.replay.forget()

    def check(self) -> None:
        """The invariants, for tests."""
        counted: Counter[str] = Counter()
        for stored in self._by_id.values():
            counted[stored.owner] += stored.num_bytes
        assert counted == self._num_bytes, (counted, self._num_bytes)

    def _make_room(self) -> None:
        self._drop_old()
        while len(self._by_id) > MAX_RESPONSES or self._num_bytes.total() > MAX_BYTES:
            owners = [owner for owner, _ in self._num_bytes.most_common()]
            oldest = next(filter(None, map(self._oldest_finished, owners)), None)
            if oldest is None:
                return
            self.remove(oldest)

    def _drop_old(self) -> None:
        while oldest := self._oldest_finished():
            if oldest.since > time.monotonic() - MAX_AGE_S:
                return
            self.remove(oldest)

    def _oldest_finished(self, owner: str | None = None) -> Stored | None:
        return next(
            (each for each in self._by_id.values() if not each.is_running and owner in (None, each.owner)), None
        )
