"""Token ids become text again, a few at a time.

Every token stands for some bytes of the text whatever its neighbours, so decoding is looking up and joining bytes: O(1)
per token, and the deltas of a stream add up to `Tokenizer.decode` of the whole. Half a character waits for its other
half, and text that may yet become a stop string waits until it cannot.
"""

import codecs
import json
from collections.abc import Callable, Iterable

import tokenizers

from engine.errors import UserError


class Detokenizer:
    """The text of one growing sequence. `stop_string` is the stop string found, and then nothing more comes out."""

    def __init__(
        self,
        pieces: "Pieces",
        *,
        skip_special_tokens: bool = True,
        stop: Iterable[str] = (),
        include_stop_str: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = _Decoder(pieces, skip_special_tokens)
        self._stops = StopStrings(stop, include_stop_str) if stop else None
        self._min_tokens = min_tokens
        self.num_tokens = 0  # taken so far: up to the one that completed the stop string

    @property
    def stop_string(self) -> str | None:
        return self._stops.found if self._stops else None

    def add(self, token_ids: list[int]) -> str:
        """The text that these tokens make certain."""
        if self._stops is None:
            self.num_tokens += len(token_ids)
            return self._decoder.add(token_ids)
        text = ""
        for token_id in token_ids:
            if self._stops.found is not None:
                break
            self.num_tokens += 1
            text += self._stops.add(self._decoder.add([token_id]), is_exempt=self.num_tokens <= self._min_tokens)
        return text

    def finish(self) -> str:
        """What was held back, at the end of the sequence."""
        text = self._decoder.finish()
        if self._stops is None:
            return text
        return self._stops.add(text, is_exempt=self.num_tokens <= self._min_tokens) + self._stops.finish()


class StopStrings:
    """Cuts a text that arrives in parts before (or after) the first stop string, wherever the parts break.

    The first to end wins, and of those that end there the longest. What can still become a stop string is held back, so
    nothing that comes out ever has to be taken back.
    """

    def __init__(self, stops: Iterable[str], include_stop_str: bool = False) -> None:
        self._stops = list(stops)
        self._include = include_stop_str
        self._held = ""
        self.found: str | None = None

    def add(self, text: str, is_exempt: bool = False) -> str:
        """The text that is certain to stay. A stop string that ends in an exempt part does not count."""
        if self.found is not None:
            return ""
        num_held, text = len(self._held), self._held + text
        matches = [] if is_exempt else [match for stop in self._stops if (match := _find(text, stop, num_held))]
        if matches:
            end, start, self.found = min(matches)
            self._held = ""
            return text[: end if self._include else start]
        num_kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_kept :]
        return text[: len(text) - num_kept]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def _find(text: str, stop: str, num_old: int) -> tuple[int, int, str] | None:
    """(end, start, stop) of the first occurrence that ends in the new part of the text."""
    start = text.find(stop, max(0, num_old - len(stop) + 1))
    return (start + len(stop), start, stop) if start >= 0 else None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning, but not the whole, of the stop string."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


class _Decoder:
    """Bytes to characters: keeps the bytes of an unfinished character for the next call."""

    def __init__(self, pieces: "Pieces", skip_special_tokens: bool) -> None:
        self._pieces = pieces
        self._table = pieces.table(skip_special_tokens)
        self._partial = b""
        self._is_first = pieces.drops_space_of_first_token
        self._num_strip = pieces.num_leading_spaces_stripped

    def add(self, token_ids: list[int]) -> str:
        data = b"".join([self._table[token_id] for token_id in token_ids])
        if self._is_first and data:
            data = self._without_first_space(token_ids)
        data = self._partial + data
        text, num_used = codecs.utf_8_decode(data, "replace", False)
        self._partial = data[num_used:]
        return self._strip(text) if self._num_strip else text

    def finish(self) -> str:
        text, self._partial = self._partial.decode("utf-8", "replace"), b""
        return self._strip(text)

    def _without_first_space(self, token_ids: list[int]) -> bytes:
        self._is_first = False
        shown = [token_id for token_id in token_ids if self._table[token_id]]
        return self._pieces.without_space(shown[0]) + b"".join([self._table[token_id] for token_id in shown[1:]])

    def _strip(self, text: str) -> str:
        while self._num_strip and text:
            self._num_strip = self._num_strip - 1 if text[0] == " " else 0
            text = text.removeprefix(" ") if text[0] == " " else text
        return text


class Pieces:
    """The bytes that each token adds to the text, derived from the decoder that tokenizer.json describes.

    Where a run of byte tokens is not UTF-8, the `tokenizers` library gives up on the whole run; here the good
    characters of it stay, because by then they have been sent.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        num_ids = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.special_ids = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        self.num_leading_spaces_stripped = 0
        self.drops_space_of_first_token = False
        self._metaspace = ""
        self._steps: list[Callable[[str], str | bytes]] = []
        self._read_decoder()
        self._tables = {
            True: _Table(lambda id: b"" if id in self.special_ids else self._bytes_of(id), num_ids),
            False: _Table(self._bytes_of, num_ids),
        }

    def table(self, skip_special_tokens: bool) -> dict[int, bytes]:
        """Token id → bytes, filled as it is asked; an id that the tokenizer does not have adds nothing."""
        return self._tables[skip_special_tokens]

    def without_space(self, token_id: int) -> bytes:
        """What the token adds when it is the first and the decoder drops the space before the first word."""
        token = self._backend.id_to_token(token_id) or ""
        return token.replace(self._metaspace, "").encode() if self._metaspace in token else self._bytes_of(token_id)

    def _bytes_of(self, token_id: int) -> bytes:
        piece: str | bytes = self._backend.id_to_token(token_id) or ""
        for step in self._steps:
            if isinstance(piece, str):
                piece = step(piece)
        return piece if isinstance(piece, bytes) else piece.encode()

    def _read_decoder(self) -> None:
        if self._backend.decoder is None:  # tokens are words, joined by spaces
            self._steps.append(lambda token: " " + token if token else "")
            self.num_leading_spaces_stripped = 1
            return
        spec = json.loads(self._backend.decoder.__getstate__())
        for step in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
            self._read_step(step)

    def _read_step(self, step: dict) -> None:
        match step:
            case {"type": "ByteLevel"}:
                self._steps.append(_bytes_of_byte_level)
            case {"type": "ByteFallback"}:
                self._steps.append(_byte_of_fallback)
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                self._steps.append(lambda token: token.replace(old, new))
            case {"type": "Strip", "content": " ", "start": start, "stop": 0}:
                self.num_leading_spaces_stripped = start
            case {"type": "Metaspace", "replacement": old, "prepend_scheme": scheme}:
                self._steps.append(lambda token: token.replace(old, " "))
                self.drops_space_of_first_token = scheme != "never"
                self._metaspace = old
            case _:
                raise UserError(
                    f"this tokenizer decodes with {json.dumps(step)}, and vcli reads only byte-level BPE and "
                    "sentencepiece-style tokenizers: serve token ids with --skip-tokenizer-init"
                )


class _Table(dict[int, bytes]):
    """A dict that makes its entries when they are first asked for, of the ids that exist."""

    def __init__(self, make: Callable[[int], bytes], num_ids: int) -> None:
        self._make = make
        self._num_ids = num_ids

    def __missing__(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._num_ids:
            return b""
        self[token_id] = piece = self._make(token_id)
        return piece


def _bytes_of_byte_level(token: str) -> bytes:
    """Byte-level BPE writes every byte as one printable character; added tokens are written as they are."""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()


def _byte_of_fallback(token: str) -> str | bytes:
    """sentencepiece writes a byte that no token covers as <0xE2>."""
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return token
    try:
        return bytes([int(token[3:5], 16)])
    except ValueError:
        return token


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()
