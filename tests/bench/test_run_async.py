"""Signals while a coroutine runs."""

import asyncio
import signal

import pytest

from bench.run_async import run_async
from engine.errors import UserError


@pytest.fixture(autouse=True)
def _hears_ctrl_c():
    """Where the tests run in the background they are born deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_it_gives_what_the_coroutine_gives_and_leaves_the_handlers_as_they_were():
    async def answer() -> int:
        return 42

    before = signal.getsignal(signal.SIGTERM)

    assert run_async(answer()) == 42
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (signal.default_int_handler, before)


def test_a_signal_ends_the_coroutine_in_order_and_is_raised_afterwards():
    done: list[str] = []

    async def stopped() -> None:
        signal.raise_signal(signal.SIGINT)
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0)
            done.append("closed")

    with pytest.raises(KeyboardInterrupt):
        run_async(stopped())
    assert done == ["closed"]


def test_a_signal_is_not_lost_in_an_error_that_came_of_it():
    """A signal to the whole process group ends the client processes, too."""

    async def stopped() -> None:
        signal.raise_signal(signal.SIGINT)
        try:
            await asyncio.sleep(30)
        finally:
            raise UserError("a process of the load client ended")

    with pytest.raises(KeyboardInterrupt):
        run_async(stopped())
