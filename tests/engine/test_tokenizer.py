import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.detokenizer import Detokenizer, StopStrings
from engine.errors import UserError
from engine.tokenizer import Tokenizer

SPECIAL_TOKENS = ["<s>", "</s>", "<|tool call|>", "<日本>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "  wörter  mit ümlauten",
    "def f(x):\n    return x",
    "日本語 🙂",
]
ROOT = Path(__file__).resolve().parents[2]


def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL_TOKENS)
    )
    return backend


def sentencepiece_like(decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    """Words begin with ▁; a character without a token of its own is written in <0xXX> tokens."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(CORPUS[:3], trainers.BpeTrainer(vocab_size=120))
    spec = json.loads(trained.to_str())
    pieces = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *spec["model"]["vocab"]]
    spec["model"] |= {"vocab": {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}, "byte_fallback": True}
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.add_special_tokens(SPECIAL_TOKENS)
    backend.decoder = decoder
    return backend


LLAMA_2 = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
BACKENDS = {
    "byte-level": byte_level(),
    "llama 2": sentencepiece_like(decoders.Sequence(LLAMA_2)),
    "gemma": sentencepiece_like(decoders.Sequence(LLAMA_2[:3])),
    "from gguf": sentencepiece_like(decoders.Sequence([LLAMA_2[1], LLAMA_2[2], LLAMA_2[0], LLAMA_2[3]])),
    "metaspace": sentencepiece_like(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
}
KINDS = {kind: Tokenizer(backend, eos_token="</s>") for kind, backend in BACKENDS.items()}
texts = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from([*SPECIAL_TOKENS, "👩‍👩‍👧", "🇩🇪", " ", "  ", "the fox", "\n", "é"]))
).map("".join)


def parts_of(token_ids: list[int], data: st.DataObject) -> list[list[int]]:
    parts = []
    while token_ids:
        size = data.draw(st.integers(1, 4))
        parts.append(token_ids[:size])
        token_ids = token_ids[size:]
    return parts


def stream(tokenizer: Tokenizer, parts: list[list[int]], **options) -> str:
    detokenizer = Detokenizer(tokenizer.pieces, **options)
    return "".join([detokenizer.add(part) for part in parts]) + detokenizer.finish()


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(text=texts, skip=st.booleans(), data=st.data())
def test_deltas_of_a_text_add_up_to_what_the_library_decodes(kind: str, text: str, skip: bool, data: st.DataObject):
    token_ids = BACKENDS[kind].encode(text, add_special_tokens=False).ids
    expected = BACKENDS[kind].decode(token_ids, skip_special_tokens=skip)
    assert stream(KINDS[kind], parts_of(token_ids, data), skip_special_tokens=skip) == expected
    assert KINDS[kind].decode(token_ids, skip_special_tokens=skip) == expected


@settings(deadline=None)
@given(token_ids=st.lists(st.integers(0, 450)), skip=st.booleans(), data=st.data())
def test_deltas_of_any_byte_level_tokens_add_up_to_what_the_library_decodes(token_ids, skip: bool, data):
    expected = BACKENDS["byte-level"].decode(token_ids, skip_special_tokens=skip)  # 400 to 450 exist nowhere
    assert stream(KINDS["byte-level"], parts_of(token_ids, data), skip_special_tokens=skip) == expected


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(token_ids=st.lists(st.integers(0, 400)), data=st.data())
def test_deltas_of_any_tokens_add_up_to_the_decoded_whole(kind: str, token_ids: list[int], data: st.DataObject):
    assert stream(KINDS[kind], parts_of(token_ids, data)) == KINDS[kind].decode(token_ids)


def test_half_a_character_waits_for_its_other_half():
    for tokenizer in KINDS.values():
        detokenizer = Detokenizer(tokenizer.pieces)
        deltas = [detokenizer.add([token_id]) for token_id in tokenizer.encode("🙂🚀ß", add_special_tokens=False)]
        assert "".join(deltas).lstrip() == "🙂🚀ß"
        assert all("�" not in delta for delta in deltas)


def test_the_end_of_a_sequence_gives_out_half_a_character():
    tokenizer = KINDS["byte-level"]
    half = tokenizer.encode("🚀")[:-1]
    assert stream(tokenizer, [half]) == "�" == BACKENDS["byte-level"].decode(half)


@settings(deadline=None, max_examples=300)
@given(
    text=st.text("ab.", max_size=30),
    stops=st.lists(st.text("ab.", min_size=1, max_size=5), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 30)),
    include=st.booleans(),
)
def test_a_stop_string_is_found_wherever_the_text_breaks(text: str, stops: list[str], cuts: list[int], include: bool):
    ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    end, minus_length = min(ends, default=(len(text), 0))
    expected = text[: end if include else end + minus_length]

    checker, seen = StopStrings(stops, include), ""
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    for start, stop in itertools.pairwise(places):
        seen += checker.add(text[start:stop])
        assert expected.startswith(seen), "something came out that must be taken back"
    seen += checker.finish()

    assert seen == expected
    assert (checker.found is not None) == bool(ends)


def test_only_what_may_become_a_stop_string_is_held_back():
    checker = StopStrings(["\nUser:"])
    assert checker.add("hello\nUs") == "hello"
    assert checker.add("age") == "\nUsage"


def test_tokens_after_the_stop_string_are_not_taken():
    tokenizer = KINDS["byte-level"]
    token_ids = tokenizer.encode("fox. dog. fox.")
    detokenizer = Detokenizer(tokenizer.pieces, stop=["dog"])
    assert detokenizer.add(token_ids) == "fox. "
    assert detokenizer.stop_string == "dog"
    assert tokenizer.decode(token_ids[: detokenizer.num_tokens]).endswith("dog")


def test_stop_strings_do_not_count_before_min_tokens():
    tokenizer = KINDS["byte-level"]
    token_ids = tokenizer.encode("a.b.c.d.")
    detokenizer = Detokenizer(tokenizer.pieces, stop=["."], min_tokens=4)
    assert "".join(detokenizer.add([token_id]) for token_id in token_ids) == "a.b.c"


def test_a_token_has_bytes_of_its_own():
    tokenizer = KINDS["byte-level"]
    token_ids = tokenizer.encode("naïve 🚀")
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == "naïve 🚀".encode()
    assert tokenizer.token_text(tokenizer.encode("a")[0]) == "a"


def test_ids_that_do_not_exist_add_nothing_and_cost_nothing():
    tokenizer = KINDS["byte-level"]
    assert tokenizer.decode([-1, 2**40, *tokenizer.encode("fox"), 10**6]) == "fox"
    assert 10**6 not in tokenizer.pieces.table(skip_special_tokens=True)


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(ValueError, match="not valid Unicode"):
        KINDS["byte-level"].encode("a\ud800b")


def save(folder: Path, **settings: object) -> Path:
    folder.mkdir(exist_ok=True)
    BACKENDS["byte-level"].save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_special_tokens_and_template_come_from_the_folder(tmp_path: Path):
    folder = save(
        tmp_path, eos_token={"content": "</s>"}, chat_template=[{"name": "default", "template": "from config"}]
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<s>"}))
    tokenizer = Tokenizer.load(str(folder))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_ids) == ("<s>", "</s>", (1,))
    assert tokenizer.chat_template == "from config"
    (folder / "chat_template.jinja").write_text("from its own file")
    assert Tokenizer.load(str(folder / "tokenizer.json")).chat_template == "from its own file"


@pytest.mark.parametrize("add_bos_token", [True, False, None])
@pytest.mark.parametrize("tokenizer_json_adds_it", [True, False])
def test_a_prompt_gets_bos_when_it_does_in_transformers(tmp_path: Path, add_bos_token, tokenizer_json_adds_it: bool):
    from transformers import AutoTokenizer

    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    folder = save(tmp_path, **settings, **({} if add_bos_token is None else {"add_bos_token": add_bos_token}))
    if tokenizer_json_adds_it:
        backend = byte_level()
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        backend.save(str(folder / "tokenizer.json"))
    ours, theirs = Tokenizer.load(str(folder)), AutoTokenizer.from_pretrained(folder)
    for adds in (True, False):
        assert ours.encode("the fox", adds) == theirs.encode("the fox", add_special_tokens=adds)


def test_mistakes_are_told(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere: no such file or folder"):
        Tokenizer.load(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"has no tokenizer .*--skip-tokenizer-init"):
        Tokenizer.load(str(tmp_path))
    folder = save(tmp_path)
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"tokenizer\.json is not a readable tokenizer"):
        Tokenizer.load(str(folder))
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(str(folder))


def test_an_unknown_kind_of_decoder_is_refused():
    backend = byte_level()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match=r"WordPiece.*sentencepiece-style"):
        Tokenizer(backend)


def test_loading_imports_neither_torch_nor_transformers(tmp_path: Path):
    script = "import sys; from engine.tokenizer import Tokenizer; Tokenizer.load(sys.argv[1]).encode('x'); " + (
        "import engine.async_engine; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(save(tmp_path))], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A GGUF file with nothing but the byte-level tokenizer in it."""
    from gguf import GGUFWriter, TokenType

    model = json.loads(BACKENDS["byte-level"].to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL_TOKENS else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0].content }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_a_gguf_tokenizer_is_converted_once(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = Tokenizer.load(str(gguf_file))
    text = "the quick brown <s> 日本語 fox"
    assert tokenizer.encode(text) == KINDS["byte-level"].encode(text)
    assert (tokenizer.bos_token, tokenizer.eos_token_ids) == ("<s>", (1,))
    assert tokenizer.chat_template == "{{ messages[0].content }}"

    made = [*(tmp_path / "cache" / "vcli" / "tokenizers").iterdir()]
    assert len(made) == 1, "one folder, and nothing half made"
    monkeypatch.setattr(subprocess, "run", None)  # a second conversion would fail
    assert Tokenizer.load(str(gguf_file)).encode(text) == tokenizer.encode(text)


def test_a_broken_source_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + os.urandom(100))
    with pytest.raises(UserError, match=r"broken\.gguf cannot be read \(.+\): name another one with --tokenizer"):
        Tokenizer.load(str(tmp_path / "broken.gguf"))
    assert not [*(tmp_path / "cache" / "vcli" / "tokenizers").iterdir()]
