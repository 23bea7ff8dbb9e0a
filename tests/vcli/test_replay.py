"""Clients that lose their connection and come back for the rest, over raw HTTP against the real server."""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.vcli.conftest import Server
from vcli.server.protocol import ApiError
from vcli.server.replay import KEPT_BYTES, Replays

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = {"prompt": "a b c d e f g", "max_tokens": 50, "ignore_eos": True, "stream": True}
GRACE = {"X-Reconnect-Grace-Ms": "20000"}


@pytest.fixture(scope="module")
def server(start_server):
    server = start_server(FAKE_STEP_S="0.005").wait_ready()
    yield server
    server.wait_until(lambda: server.metric("vcli:num_requests_running") == 0)
    assert "Traceback" not in server.log


@dataclass
class Seen:
    """What a client has received: the ids of its events, and their data."""

    ids: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        texts: dict[int, str] = {}
        for event in self.data[:-1] if self.data[-1] == "[DONE]" else self.data:
            for choice in json.loads(event)["choices"]:
                text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
                texts[choice["index"]] = texts.get(choice["index"], "") + text
        return [texts[index] for index in sorted(texts)]

    @property
    def is_whole(self) -> bool:
        return self.data[-1:] == ["[DONE]"]


def read(
    server: Server, path: str, body: dict[str, Any], seen: Seen, most: int | None = None, **headers: str
) -> httpx.Response:
    """Read a stream into `seen`: from its start, or after the last event seen; leave it after `most` events."""
    sent = GRACE | headers | ({"Last-Event-ID": seen.ids[-1]} if seen.ids else {})
    with httpx.stream("POST", server.url + path, json=body, headers=sent, timeout=60) as reply:
        if reply.status_code != 200:
            reply.read()
            return reply
        num_events = 0
        for line in reply.iter_lines():
            if line.startswith("id: "):
                seen.ids.append(line.removeprefix("id: "))
            elif line.startswith("data: "):
                seen.data.append(line.removeprefix("data: "))
                num_events += 1
                if num_events == most:
                    break
        return reply


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, LONG),
        (COMPLETIONS, LONG | {"prompt": ["a b c", "d e"], "n": 2, "logprobs": 1, "max_tokens": 20}),
        (
            CHAT,
            {
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 30,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        ),
    ],
)
def test_a_client_that_loses_its_connection_again_and_again_gets_every_event_once(server, path, body):
    undisturbed, seen, draw = Seen(), Seen(), random.Random(1)
    read(server, path, body, undisturbed)
    assert undisturbed.is_whole
    num_connections = 0
    while not seen.is_whole:
        assert read(server, path, body, seen, most=draw.randint(1, 9)).status_code == 200
        num_connections += 1
        time.sleep(draw.uniform(0, 0.05))
    assert num_connections > 2
    assert seen.texts == undisturbed.texts
    names, numbers = zip(*(each.rsplit("-", 1) for each in seen.ids), strict=True)
    assert len(set(names)) == 1
    assert [int(number) for number in numbers] == list(range(1, len(seen.data) + 1))


def test_what_was_sent_and_did_not_arrive_comes_again(server):
    seen = Seen()
    read(server, COMPLETIONS, LONG, seen)
    assert seen.is_whole
    again = Seen(ids=seen.ids[:3])
    read(server, COMPLETIONS, {}, again)  # what it asked for is known
    assert again.ids == seen.ids
    assert again.data == seen.data[3:]
    at_the_end = Seen(ids=seen.ids[-1:])
    assert read(server, COMPLETIONS, {}, at_the_end).status_code == 200
    assert at_the_end.data == []


def test_a_stream_goes_on_over_the_death_of_the_engine_while_its_client_is_away(server):
    undisturbed, seen = Seen(), Seen()
    read(server, COMPLETIONS, LONG, undisturbed)
    read(server, COMPLETIONS, LONG, seen, most=5)
    server.engine.kill()
    read(server, COMPLETIONS, LONG, seen)
    assert seen.texts == undisturbed.texts
    assert server.metric("vcli:engine_restarts_total") == 1


def test_after_the_grace_time_the_request_is_aborted_and_forgotten(server):
    aborted = server.metric('vcli:request_success_total{finished_reason="abort"')
    seen, patient = Seen(), Seen()
    body = LONG | {"max_tokens": 150}
    read(server, COMPLETIONS, body | {"max_tokens": 450}, seen, most=2, **{"X-Reconnect-Grace-Ms": "200"})
    read(server, COMPLETIONS, body, patient, most=2)
    server.wait_until(lambda: server.metric('vcli:request_success_total{finished_reason="abort"') == aborted + 1)
    reply = read(server, COMPLETIONS, body, seen)
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "stream_gone"
    read(server, COMPLETIONS, body, patient)
    assert patient.is_whole, "whose own time was longer"


def test_the_latest_connection_has_the_stream(server):
    body, first, second = LONG | {"max_tokens": 100}, Seen(), Seen()
    with httpx.stream("POST", server.url + COMPLETIONS, json=body, headers=GRACE, timeout=60) as reply:
        lines = reply.iter_lines()
        first.ids.append(next(lines).removeprefix("id: "))
        second.ids = list(first.ids)
        read(server, COMPLETIONS, body, second)
        rest = list(lines)
    assert second.is_whole
    assert "data: [DONE]" not in rest, "its half has ended where the other one began"
    assert 'data: {"error"' not in "".join(rest)


def test_without_the_header_there_are_no_ids_and_nothing_to_come_back_to(server):
    with httpx.stream("POST", server.url + COMPLETIONS, json=LONG) as reply:
        request_id = reply.headers["x-request-id"]
        assert not [line for line in reply.iter_lines() if line.startswith("id:")]
    assert read(server, COMPLETIONS, LONG, Seen(ids=[f"{request_id}-1"])).status_code == 404


@pytest.mark.parametrize("event_id", ["", "-", "x-1", "{}-0x1", "{}-99999", "{}--1", "{}"])
def test_an_event_that_never_was_is_not_found(server, event_id):
    seen = Seen()
    read(server, COMPLETIONS, LONG | {"max_tokens": 3}, seen)
    unknown = Seen(ids=[event_id.replace("{}", seen.ids[0].rsplit("-", 1)[0])])
    assert read(server, COMPLETIONS, {}, unknown).status_code == 404


@pytest.mark.parametrize("grace", ["soon", "-1", "60001", "1.5", "9" * 30])
def test_a_grace_time_that_is_none_is_refused(server, grace):
    reply = read(server, COMPLETIONS, LONG, Seen(), **{"X-Reconnect-Grace-Ms": grace})
    assert reply.status_code == 400
    assert "X-Reconnect-Grace-Ms" in reply.json()["error"]["message"]


def test_a_refused_request_is_refused_with_its_own_status(server):
    assert read(server, COMPLETIONS, LONG | {"n": 0}, Seen()).status_code == 400
    assert read(server, COMPLETIONS, LONG | {"model": "another"}, Seen()).status_code == 404


def test_another_tenant_does_not_get_the_stream(start_server, tmp_path):
    keys, seen = tmp_path / "keys.toml", Seen()
    keys.write_text('[alice]\nkeys = ["key-of-alice-0001"]\n[bob]\nkeys = ["key-of-bob-00000001"]\n')
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in ("key-of-alice-0001", "key-of-bob-00000001"))
    server = start_server("--api-key-file", str(keys), FAKE_STEP_S="0.005").wait_ready()
    read(server, COMPLETIONS, LONG, seen, most=2, **alice)
    stolen = Seen(ids=list(seen.ids))
    assert read(server, COMPLETIONS, LONG, stolen, **bob).status_code == 404
    read(server, COMPLETIONS, LONG, seen, **alice)
    assert seen.is_whole


def test_the_openai_client_reads_events_with_ids(server):
    events = server.client.completions.create(
        model="", prompt="a b c", max_tokens=20, stream=True, extra_body={"ignore_eos": True}, extra_headers=GRACE
    )
    whole = server.client.completions.create(model="", prompt="a b c", max_tokens=20, extra_body={"ignore_eos": True})
    assert "".join(event.choices[0].text for event in events) == whole.choices[0].text


class Client:
    """One that notes what it is sent, and leaves when it is told to."""

    def __init__(self) -> None:
        self.sent = b""
        self.is_away = asyncio.Event()

    @property
    def numbers(self) -> list[int]:
        lines = self.sent.split(b"\n")
        return [int(line.rsplit(b"-", 1)[1]) for line in lines if line.startswith(b"id: ")]

    async def receive(self) -> dict[str, str]:
        await self.is_away.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent += message.get("body", b"")


async def make_events(name: str, num_events: int, pause: asyncio.Event, send: Any) -> None:
    """Events of 10 kB each; half of them after a pause."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", name.encode())]})
    for number in range(1, num_events + 1):
        event = b"data: " + b"x" * 10_000 + b"\n\n"
        await send({"type": "http.response.body", "body": event, "more_body": number < num_events})
        if number == num_events // 2:
            await pause.wait()


def test_as_much_is_kept_as_may_be_needed_and_no_more():
    """Of 4 MB a client is sent half; it has not come back when the rest is made."""

    async def story() -> None:
        replays, first, second, pause = Replays(), Client(), Client(), asyncio.Event()
        replay = replays.start(lambda _, send: make_events("cmpl-1", 400, pause, send), 30.0, "")
        following = asyncio.create_task(replay.follow(1, first.receive, first.send))
        while len(first.numbers) < 200:
            await asyncio.sleep(0.001)
        first.is_away.set()
        await following
        pause.set()
        await asyncio.sleep(0.1)
        with pytest.raises(ApiError, match="no stream goes on"):
            replays.find("cmpl-1-20", "")
        replay, number = replays.find("cmpl-1-190", "")
        assert sum(map(len, replay._events[: 200 - replay._first + 1])) <= KEPT_BYTES
        await replay.follow(number, second.receive, second.send)
        assert second.numbers == list(range(191, 401))
        assert sum(map(len, replay._events)) == replays._num_bytes <= KEPT_BYTES

    asyncio.run(asyncio.wait_for(story(), 30))


def test_in_the_background_a_reply_waits_for_nobody_and_keeps_its_latest_events(monkeypatch: pytest.MonkeyPatch):
    """Of 1 MB, 300 kB are kept; a follower gets all that comes while it follows, another one joins at the end."""
    monkeypatch.setattr("vcli.server.replay.KEPT_IN_BACKGROUND_BYTES", 300_000)

    async def story() -> None:
        replays, first, second, pause = Replays(), Client(), Client(), asyncio.Event()
        replay = replays.start_in_background(lambda _, send: make_events("resp_1", 100, pause, send), "")
        await replay.begin()
        assert replays.of("resp_1") is replay
        await asyncio.sleep(0.05)
        assert not replay.keeps_after(0)
        assert replay.keeps_after(21)
        following = asyncio.create_task(replay.follow(22, first.receive, first.send))
        while len(first.numbers) < 29:
            await asyncio.sleep(0.001)
        pause.set()
        await following
        await replay.follow(90, second.receive, second.send)
        assert first.numbers[:29] == list(range(22, 51))
        assert second.numbers == list(range(90, 101))
        assert sum(map(len, replay._events)) == replays._num_bytes <= 300_000
        replay.forget()
        assert (replays._num_bytes, replays.of("resp_1")) == (0, None)
        assert not replay.keeps_after(99)

    asyncio.run(asyncio.wait_for(story(), 30))


def test_a_reply_in_the_background_can_be_ended():
    async def story() -> None:
        replays, told = Replays(), asyncio.Event()

        async def make(receive: Any, send: Any) -> None:
            await make_events("resp_1", 3, told, send)
            assert (await receive())["type"] == "http.disconnect"

        replay = replays.start_in_background(make, "")
        told.set()
        await replay.end()
        assert replay.is_over()
        assert replay.keeps_after(0), "what it has said stays"

    asyncio.run(asyncio.wait_for(story(), 30))


def test_streams_that_are_over_go_early_when_all_of_them_together_are_too_much(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vcli.server.replay.MOST_BYTES", 260_000)

    async def story() -> None:
        replays, pause, waiting = Replays(), asyncio.Event(), asyncio.Event()
        pause.set()
        started = [("a", pause), ("b", waiting), ("c", pause), ("d", pause)]  # 100 kB each, of b the half
        for name, its_pause in started:
            client = Client()
            replay = replays.start(lambda _, send, n=name, p=its_pause: make_events(n, 10, p, send), 30.0, "")
            following = asyncio.create_task(replay.follow(1, client.receive, client.send))
            await asyncio.sleep(0.05)
            client.is_away.set()
            await following
        assert list(replays._by_id) == ["b", "c", "d"], "the first that was over has gone"
        waiting.set()
        await asyncio.sleep(0.05)
        assert list(replays._by_id) == ["b", "d"], "b has grown, and nobody has been sent the rest of it"
        assert replays._num_bytes == sum(replay._num_bytes for replay in replays._by_id.values())

    asyncio.run(asyncio.wait_for(story(), 30))
