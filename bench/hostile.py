"""What good and bad clients send to a server, as bytes: sound requests, and all that can be wrong with one.

A visit is drawn from a number alone, so that any of them can be made again. Some good clients lose their connection and
come back for the rest. Bad ones are of five kinds: clients that leave (in the middle of a stream, before an answer, in
the middle of their own request), values that no field should have, bodies with bytes changed at random, heads that are
no HTTP, and prompts whose logits are NaN.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG_LEN = 200  # tokens of an answer that its client does not wait for

# What is sent in the place of a value, or of a number within a body.
STRANGE_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e-300, 1e300, 2**31, 2**53 + 1, 2**63, -(2**63), 10**19, 10**400),
    *("", "a", "\x00", "\ud800", "ü\u2028\U0001f600", "1", "NaN", "a" * 5_000, "{{ x }}", "{% for x in range(9) %}"),
    *([], [None], ["a"], [""], [0], [-1], [511], [10**9], [[1, 2], [3]], [["a"]], [1, "a"], [[]], ["a"] * 70),
    *({}, {"1": 1}, {"1": -100}, {"x": {}}, {"type": "text"}, {"include_usage": True}, {"a": {"a": {"a": []}}}),
    *([{"role": "user"}], [{"role": "user", "content": None}], [{"role": 1, "content": []}], [{"type": "text"}]),
]
STRANGE_WORDS = [b"NaN", b"Infinity", b"-0", b"1e999", b"1e-999", b"9" * 400, b"null", b'"', b"\\u0000", b"[" * 99]
FIELDS = (
    *("model", "prompt", "messages", "n", "best_of", "max_tokens", "max_completion_tokens", "min_tokens"),
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "logit_bias", "logprobs"),
    *("top_logprobs", "echo", "prompt_logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("stream", "stream_options", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output"),
    *("return_token_ids", "priority", "cache_salt", "add_special_tokens", "add_generation_prompt"),
    *("continue_final_message", "chat_template_kwargs", "suffix", "user", "tools", "tool_choice"),
    *("response_format", "guided_json", "tokens", "detokenize", "chat_template", "metadata"),
)
STRANGE_HEADERS = [
    b"content-length: -1",
    b"content-length: 7\r\ncontent-length: 8",
    b"transfer-encoding: chunked\r\ncontent-length: 3",
    b"x-request-deadline-ms: soon",
    b"x-request-deadline-ms: 1",
    b"authorization: " + bytes(range(128, 256)),
    b"last-event-id: \xff-1",
    b"last-event-id: chatcmpl-0-99999999999999999999",
    b"cookie: " + b"a" * 20_000,
    b": nameless",
    b"content-type: text/html; charset=\xff",
    b"expect: 100-continue",
    b"upgrade: websocket\r\nconnection: upgrade",
]


@dataclass(frozen=True)
class Visit:
    """One connection: what is sent, and when the client is gone."""

    kind: str
    data: bytes
    is_sound: bool = False  # to be answered with 200, to its end
    num_events: int | None = None  # of a stream, after which the client leaves; 0: as soon as it has sent everything
    patience_s: float = 60.0  # after which it leaves
    may_be_no_http: bool = False  # the server may close the connection without a word
    must_fail: bool = False  # with logits that are NaN
    comes_back: bool = False  # after it has left, for the rest
    body: bytes = b""  # of a sound request, to know it by


class Visitors:
    """Draws visits. A model is known by its vocabulary alone: prompts are token ids below `vocab_size`."""

    def __init__(self, seed: int, vocab_size: int = 200, spoilt_token: int | None = None) -> None:
        """spoilt_token: one whose embedding is NaN; sound requests keep clear of it."""
        self.seed = seed
        self.vocab_size = vocab_size
        self.spoilt_token = spoilt_token
        self.sound = [self._sound(random.Random(f"{seed} sound {i}"), i) for i in range(12)]
        self._kinds: list[tuple[float, Callable[[random.Random], Visit]]] = [
            (40, lambda draw: draw.choice(self.sound)),
            (12, self._leaver),
            (6, self._returner),
            (6, self._half_sent),
            (20, self._strange_values),
            (20, self._changed_bytes),
            (5, self._no_http),
            (2 if spoilt_token is not None else 0, self._spoilt),
        ]

    def visit(self, number: int) -> Visit:
        """The visit of this number."""
        draw = random.Random(f"{self.seed} {number}")
        weights = [weight for weight, _ in self._kinds]
        [(_, make)] = draw.choices(self._kinds, weights)
        return make(draw)

    def _sound(self, draw: random.Random, index: int) -> Visit:
        """Short requests of all shapes."""
        body = self._body(draw, max_tokens=draw.randint(1, 8))
        shapes: list[dict[str, Any]] = [{}, {"n": 2}, {"temperature": 0.8, "seed": index}, {"logprobs": 2}]
        body |= shapes[index % 4] | {"stream": index % 2 == 1}
        if index % 3 == 2:
            del body["prompt"]
            body |= {"messages": [{"role": "user", "content": f"number {index}"}], "logprobs": index % 2 == 0}
            return _sound_visit(CHAT, body)
        return _sound_visit(COMPLETIONS, body)

    def _body(self, draw: random.Random, **options: Any) -> dict[str, Any]:
        prompt = [draw.randrange(3, self.vocab_size) for _ in range(draw.choice([1, 5, 20, 60]))]
        body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, **options}
        if self.spoilt_token is not None:
            body["logit_bias"] = {str(self.spoilt_token): -100}
        return body

    def _leaver(self, draw: random.Random) -> Visit:
        body = self._body(draw, max_tokens=LONG_LEN, n=draw.choice([1, 1, 3]), stream=draw.random() < 0.7)
        if body["stream"]:
            return Visit("leaves a stream", post(COMPLETIONS, body), num_events=draw.randint(0, 6))
        return Visit("leaves before the answer", post(COMPLETIONS, body), patience_s=draw.uniform(0, 0.1))

    def _returner(self, draw: random.Random) -> Visit:
        streams = [each for each in self.sound if b'"stream": true' in each.body]
        visit, header = draw.choice(streams), b"\r\nx-reconnect-grace-ms: 3000\r\n"
        data = visit.data.replace(b"\r\n", header, 1)
        return replace(visit, kind="comes back", data=data, num_events=draw.randint(1, 4), comes_back=True)

    def _half_sent(self, draw: random.Random) -> Visit:
        whole = post(COMPLETIONS, self._body(draw, max_tokens=8))
        return Visit("half a request", whole[: draw.randrange(len(whole))], num_events=0, may_be_no_http=True)

    def _spoilt(self, draw: random.Random) -> Visit:
        body = self._body(draw, max_tokens=8, stream=draw.random() < 0.5)
        body["prompt"].append(self.spoilt_token)
        return Visit("NaN logits", post(COMPLETIONS, body), must_fail=True)

    def _strange_values(self, draw: random.Random) -> Visit:
        path, body = self._request(draw)
        for name in draw.sample(FIELDS, draw.randint(1, 3)):
            body[name] = draw.choice(STRANGE_VALUES)
        headers = [draw.choice(STRANGE_HEADERS)] if draw.random() < 0.1 else []
        # A second length, or none that fits, is no HTTP.
        return Visit("strange values", post(path, body, headers), patience_s=1.0, may_be_no_http=bool(headers))

    def _changed_bytes(self, draw: random.Random) -> Visit:
        path, body = self._request(draw)
        content = json.dumps(body, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
        for _ in range(draw.choice([1, 1, 2, 4, 8, 32])):
            content = _changed(draw, content)
        return Visit("changed bytes", _with_head(path, content, []), patience_s=1.0)

    def _no_http(self, draw: random.Random) -> Visit:
        head = post(draw.choice([CHAT, "/%", "/v1/models/%00", "/health"]), self._body(draw))
        data = draw.choice([lambda: draw.randbytes(draw.randint(1, 3000)), lambda: _changed(draw, head)])()
        return Visit("no HTTP", data, patience_s=0.5, may_be_no_http=True)

    def _request(self, draw: random.Random) -> tuple[str, dict[str, Any]]:
        """Something to be spoilt."""
        body = self._body(draw, max_tokens=4)
        body |= draw.choice([{}, {"stream": True}, {"logprobs": 3, "echo": True}, {"stop": ["a", "bc"], "n": 2}])
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [_part("hello")]}]
        return draw.choice(
            [
                (COMPLETIONS, body),
                (COMPLETIONS, body | {"prompt": ["one", "two three"], "seed": 5, "top_p": 0.9, "min_tokens": 1}),
                (CHAT, {"messages": messages, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}),
                (CHAT, {"messages": messages, "stream": True, "max_tokens": 4, "stream_options": {}, "n": 2}),
                ("/tokenize", {"prompt": "hello world", "return_token_strs": True}),
                ("/tokenize", {"messages": messages, "add_generation_prompt": True}),
                ("/detokenize", {"tokens": [5, 6, 7]}),
            ]
        )


def post(path: str, body: dict[str, Any], headers: list[bytes] | None = None) -> bytes:
    """A request with this body; surrogates and numbers that JSON does not have stay what Python makes of them."""
    return _with_head(path, json.dumps(body).encode(), headers or [])


def _sound_visit(path: str, body: dict[str, Any]) -> Visit:
    return Visit("sound", post(path, body), is_sound=True, body=json.dumps(body).encode())


def _with_head(path: str, content: bytes, headers: list[bytes]) -> bytes:
    lines = [f"POST {path} HTTP/1.1".encode(), b"host: localhost", b"connection: close", *headers]
    if not any(header.startswith(b"content-length") for header in headers):
        lines.append(b"content-length: %d" % len(content))
    return b"\r\n".join([*lines, b"", content])


def _changed(draw: random.Random, content: bytes) -> bytes:
    """One change somewhere: bits, bytes, whole parts, or a word that stands for a value."""
    start = draw.randrange(len(content) + 1)
    end = min(len(content), start + draw.choice([1, 1, 2, 8, 40]))
    part = content[start:end]
    new = draw.choice(
        [
            lambda: bytes(byte ^ 1 << draw.randrange(8) for byte in part),
            lambda: draw.randbytes(len(part)),
            lambda: b"",
            lambda: part * draw.choice([2, 3, 50]),
            lambda: part + draw.choice([b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\xff", b"\x00"]),
            lambda: draw.choice(STRANGE_WORDS),
            lambda: json.dumps(draw.choice(STRANGE_VALUES)).encode(),
        ]
    )()
    return content[:start] + new + content[end:]


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
