"""Text becomes token ids and back, with what the model's folder says about special tokens and chat.

The usual path reads tokenizer.json with the `tokenizers` library and nothing else. A tokenizer of another kind (inside
a GGUF file, sentencepiece, tiktoken) is converted once and kept on disk; from then on its path is the usual one.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers

from engine.detokenizer import Detokenizer, Pieces
from engine.errors import UserError
from engine.tokenizer_conversion import converted_tokenizer


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.pieces = Pieces(backend)
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.chat_template = chat_template
        added_tokens = backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: id for id, token in added_tokens.items() if token.special}
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        eos_token_id = None if eos_token is None else backend.token_to_id(eos_token)
        self.eos_token_ids = () if eos_token_id is None else (eos_token_id,)

    @classmethod
    def load(cls, path_or_name: str, revision: str = "") -> "Tokenizer":
        """The tokenizer of a model folder, a GGUF file or a name on the hub. Raises UserError."""
        path = Path(path_or_name)
        if not path_or_name or not path.exists():
            from engine.hub import resolve_model

            path = resolve_model(path_or_name, revision)
        if path.name == "tokenizer.json":
            path = path.parent
        if (path / "tokenizer.json").is_file():
            return _load_folder(cls, path)
        return _load_folder(cls, converted_tokenizer(path))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Many texts at once, on all cores. Raises ValueError for text that is none."""
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except TypeError as error:  # all that the library says about a string it cannot read
            raise ValueError("the text is not valid Unicode: it holds half of a surrogate pair") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        detokenizer = Detokenizer(self.pieces, skip_special_tokens=skip_special_tokens)
        return detokenizer.add(token_ids) + detokenizer.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; half a character is possible."""
        return self.pieces.table(skip_special_tokens=False)[token_id]

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")


def _load_folder(cls: type[Tokenizer], folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    config = _read_json(folder / "tokenizer_config.json")
    special_tokens = {**_read_json(folder / "special_tokens_map.json"), **config}
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{file} is not a readable tokenizer ({error}): download it again") from error
    bos_token, eos_token = (_token_string(special_tokens.get(name)) for name in ("bos_token", "eos_token"))
    return cls(backend, bos_token=bos_token, eos_token=eos_token, chat_template=_chat_template(folder, config))


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The newest place wins: a file of its own, then an entry of tokenizer_config.json, then chat_template.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several with names
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _token_string(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__} where an object is expected: download it again")
    return content
