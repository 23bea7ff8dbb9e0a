"""What the tests of the load client share."""

from collections.abc import Iterator

import pytest

from tests.bench.fake_server import FakeServer, running_fake_server


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    """The server, listening in a thread of its own; its fields may be changed while it runs."""
    with running_fake_server() as server:
        yield server
