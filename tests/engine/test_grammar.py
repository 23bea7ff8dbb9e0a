"""Grammars as text, compiled with a small tokenizer: what they let through, what is refused, and where it is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

from engine import grammar_compiler, ops
from engine.grammar import (
    GrammarError,
    Tag,
    choice_grammar,
    json_grammar,
    lark_grammar,
    regex_grammar,
    tagged_grammar,
)
from engine.grammar_compiler import GrammarCompiler
from engine.ops import reference
from engine.sampling_params import SamplingParams
from engine.token_mask import TokenMask, num_words
from engine.tokenizer import Tokenizer
from tests.conftest import save_tokenizer
from tests.engine.random_schemas import random_schema

EOS = 2
VOCAB = 520  # eight more than the tokenizer has, as models are padded


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return Tokenizer.load(str(folder))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(lambda: tokenizer, VOCAB, [EOS, 0])


def follow(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: str, text: str) -> str:
    """How far a text keeps to a grammar: "part", "whole", "end" (nothing can follow it), or "no"."""
    mask = TokenMask(SamplingParams(grammar=grammar), compiler.compile(grammar), [], VOCAB)
    for token_id in tokenizer.encode(text):
        if not allowed(mask)[token_id]:
            return "no"
        mask.take(token_id)
    if mask.is_ended:
        return "end"
    return "whole" if allowed(mask)[EOS] else "part"


def allowed(mask: TokenMask) -> np.ndarray:
    """The tokens that may come next, [VOCAB] bool."""
    words = np.empty(num_words(VOCAB), np.uint32)
    mask.fill(words)
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:VOCAB].astype(bool)


PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
CALL = Tag('<tool_call>\n{"name": "f", "arguments": ', PERSON, "}\n</tool_call>", "<tool_call>")
CALLED = '<tool_call>\n{"name": "f", "arguments": {"age": 3}}\n</tool_call>'


@pytest.mark.parametrize(
    ("grammar", "text", "verdict"),
    [
        (json_grammar(PERSON), '{"age": 1', "part"),
        (json_grammar(PERSON), '{"age": 1}', "end"),
        (json_grammar(PERSON), '{\n  "age": -12\n}', "end"),
        (json_grammar(PERSON), '{"age": 1.5', "no"),
        (json_grammar(PERSON), '{"name": 1}', "no"),
        (json_grammar(PERSON), "{" + " " * 40, "no"),  # no white space without end
        (json_grammar(PERSON, whitespace=""), '{"age":1}', "end"),
        (json_grammar(PERSON, whitespace=""), '{"age": 1}', "no"),
        (json_grammar(json.dumps(PERSON)), '{"age": 1}', "end"),
        (json_grammar({"type": "integer"}), "9007199254740991", "end"),
        (json_grammar({"type": "integer"}), "9007199254740992", "no"),  # no digits without end
        (json_grammar({"type": "number", "minimum": -1.5, "maximum": 2}), "1.123456789", "end"),  # nor decimals
        (json_grammar({"type": "number", "minimum": -1.5, "maximum": 2}), "-1.6", "no"),
        (json_grammar({"type": "number"}), "1.12345678901234567890e-7", "whole"),
        (json_grammar(True), '["anything", {"a": null}]', "end"),
        (regex_grammar(r"\d{3}/[a-z]+\n?"), "123/ab", "whole"),
        (regex_grammar(r"\d{3}/[a-z]+\n?"), "12/ab", "no"),
        (choice_grammar(['say "yes"', "no\\", "say"]), 'say "yes"', "end"),
        (choice_grammar(['say "yes"', "no\\", "say"]), "say", "whole"),
        (choice_grammar(["Größe ☃"]), "Größe ☃", "end"),
        (lark_grammar('start: "a" b+\nb: "b" | "c"'), "abc", "whole"),
        (lark_grammar('root ::= "a" [b-d]+'), "abd", "whole"),  # GBNF
        (tagged_grammar([CALL]), "hello, <tool_ca ", "whole"),
        (tagged_grammar([CALL]), f"hello {CALLED}{CALLED} there", "whole"),
        (tagged_grammar([CALL]), "hello <tool_call>there", "no"),
        (tagged_grammar([CALL]), f"{CALLED}<tool_call>there", "no"),
        (tagged_grammar([CALL], at_most=1), "hello", "whole"),
        (tagged_grammar([CALL], at_most=1), f"hello {CALLED}", "end"),
        (tagged_grammar([CALL], at_least=1), "hello", "no"),
        (tagged_grammar([CALL], at_least=1), f"{CALLED}\n{CALLED}", "whole"),
        (tagged_grammar([CALL], at_least=1, at_most=1), f"{CALLED}", "end"),
        (tagged_grammar([CALL, Tag("<now>", True, "</now>")]), f"{CALLED} and <now>[1]</now>", "whole"),
    ],
)
def test_what_a_grammar_lets_through(compiler, tokenizer, grammar, text, verdict):
    assert follow(compiler, tokenizer, grammar, text) == verdict


def test_a_special_token_stands_for_itself_alone(compiler, tokenizer):
    """<|im_start|> as text is letters, and only a grammar that names the token lets it through."""
    [im_start] = tokenizer.encode("<|im_start|>")
    text = TokenMask(SamplingParams(), compiler.compile("start: /(.|\\n)*/"), [], VOCAB)
    named = TokenMask(SamplingParams(), compiler.compile("start: <|im_start|>"), [], VOCAB)
    assert not allowed(text)[im_start]
    assert np.flatnonzero(allowed(named)).tolist() == [im_start]


def test_random_schemas_and_their_errors_agree_with_jsonschema(compiler, tokenizer):
    """What the grammar takes for whole is valid, for values that are right and values that are not."""
    values = [{}, {"name": "Ann"}, {"age": 3, "city": None}, {"tags": [1, "red"]}, {"price": 2.5, "id": -7}, []]
    verdicts = []
    for seed in range(40):
        schema = random_schema(seed)
        is_valid = jsonschema.Draft202012Validator(schema).is_valid
        for value in values:
            verdict = follow(compiler, tokenizer, json_grammar(schema), json.dumps(value))
            assert verdict != "end" or is_valid(value), (schema, value)
            verdicts.append(verdict)
    assert "end" in verdicts
    assert "no" in verdicts


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: json_grammar({"properties": {"a": {"items": {"anyOf": [{"type": "foo"}]}}}}),
            "properties.a.items.anyOf",
        ),
        (lambda: json_grammar({"properties": {"a": {"$ref": "#/$defs/b"}}}), "at properties.a: Pointer '/$defs/b'"),
        (lambda: json_grammar({"items": {"uniqueItems": True}}), 'at items: Unimplemented keys: ["uniqueItems"]'),
        (lambda: json_grammar({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "use anyOf"),
        (lambda: json_grammar({"$ref": "file:///etc/passwd"}), "not present in a registry"),
        (lambda: json_grammar({"type": "integer", "minimum": 2, "maximum": 1}), "Unsatisfiable"),
        (lambda: json_grammar({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), ""),
        (lambda: json_grammar({"type": "number", "minimum": -(10**400), "maximum": 10**400}), ""),
        (lambda: json_grammar('{"type": '), "not valid JSON"),
        (lambda: json_grammar("[1]"), "an object"),
        (lambda: json_grammar(False), "no value"),
        (lambda: json_grammar({"enum": ["a" * 200_000]}), "131,072"),
        (lambda: regex_grammar("ab(c"), "unclosed group"),
        (lambda: regex_grammar("((a{1000}){1000}){1000}"), "too complex"),
        (lambda: lark_grammar('start: a b\na: "x"'), 'line 1, column 8: unknown name: "b"'),
        (lambda: lark_grammar("root ::= ("), "GBNF"),
        (lambda: choice_grammar([]), "at least one"),
        (lambda: choice_grammar(["a", ""]), "empty"),
        (lambda: tagged_grammar([Tag("<a>", True, "", trigger="<b>")]), "trigger"),
        (lambda: "start: " + "(" * 100 + '"a"' + ")" * 100, "deep"),
    ],
)
def test_a_bad_grammar_is_refused_with_its_place(compiler, make, words):
    with pytest.raises(GrammarError) as error:
        compiler.compile(make())
    assert words in str(error.value)
    assert len(str(error.value)) < 700


def test_grammars_of_any_kind_and_size_end_no_process():
    """Names that go 10,000 deep, repetitions of repetitions: in a process of its own, since it may not survive."""
    script = Path(__file__).with_name("hostile_grammars.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100, cwd=script.parents[2])
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[-2000:]
    assert run.stdout.splitlines()[-1] == "survived"


def test_objects_of_many_fields_and_long_strings_are_possible(compiler, tokenizer):
    many = json_grammar({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}})
    assert follow(compiler, tokenizer, many, '{"p12": "a", "p77": "b"}') == "end"
    long = json_grammar({"type": "string", "maxLength": 10_000})
    assert follow(compiler, tokenizer, long, json.dumps("a long story " * 500)) == "end"


def test_a_grammar_that_is_worn_out_is_compiled_anew(tokenizer, monkeypatch):
    """Sequences share the lexer's states, and their number is limited: what is in use for long must not end."""
    monkeypatch.setitem(grammar_compiler.LIMITS, "max_lexer_states", 700)
    compiler = GrammarCompiler(lambda: tokenizer, VOCAB, [EOS])
    grammar = json_grammar({"type": "string", "maxLength": 2_000})
    compiled = compiler.compile(grammar)
    first, second = (TokenMask(SamplingParams(grammar=grammar), compiled, [], VOCAB) for _ in range(2))
    for token_id in tokenizer.encode('"' + "a" * 400):
        for mask in (first, second):
            if not mask.is_ended:
                mask.fill(np.empty(num_words(VOCAB), np.uint32))
                mask.take(token_id)
    assert compiled.num_renewals == 1, "by the first of the two"
    assert "too complex" in first.error
    fresh = TokenMask(SamplingParams(grammar=grammar), compiled, [], VOCAB)
    assert allowed(fresh).any()
    for token_id in tokenizer.encode('"short"'):
        assert allowed(fresh)[token_id]
        fresh.take(token_id)
    assert (fresh.is_ended, fresh.error) == (True, "")

    def refuse() -> None:
        raise GrammarError("no time")

    monkeypatch.setattr(compiled, "_compile_again", refuse)
    last = TokenMask(SamplingParams(grammar=grammar), compiled, [], VOCAB)
    for token_id in tokenizer.encode('"' + "a" * 400):
        allowed(last)
        last.take(token_id)
    assert "too complex" in last.error, "it fails alone, and does not raise"


def test_bad_words_and_allowed_tokens(compiler, tokenizer):
    params = SamplingParams(allowed_token_ids=[5, 6, 7, 40], bad_words_token_ids=[[6], [5, 7, 40], [7, 5]])
    mask = TokenMask(params, None, [5], VOCAB)

    def left() -> list[int]:
        return np.flatnonzero(allowed(mask)).tolist()

    assert left() == [5, 7, 40]
    mask.take(7)
    assert left() == [7], "5, 7 is not followed by 40, nor 7 by 5"
    mask.take(40)
    assert left() == [5, 7, 40]
    nothing = TokenMask(SamplingParams(allowed_token_ids=[6], bad_words_token_ids=[[6]]), None, [], VOCAB)
    assert not allowed(nothing).any()
    assert nothing.is_ended
    assert "no token is left" in nothing.error


@pytest.mark.parametrize("mask_logits", [ops.mask_logits, reference.mask_logits])
def test_masks_rule_tokens_out_as_brute_force_does(mask_logits):
    generator = np.random.default_rng(0)
    for vocab_size, num_rows in ((1, 1), (31, 3), (32, 3), (33, 5), (520, 4)):
        logits = torch.randn(num_rows, vocab_size)
        words = generator.integers(0, 2**32, (min(3, num_rows), num_words(vocab_size)), dtype=np.uint32)
        words[:, ::3] = generator.choice(np.array([0, 2**32 - 1], np.uint32))
        rows = generator.permutation(num_rows)[: len(words)].astype(np.int32)
        expected = logits.clone()
        for line, row in zip(words, rows, strict=True):
            for token in range(vocab_size):
                if not int(line[token // 32]) >> token % 32 & 1:
                    expected[row, token] = -torch.inf
        mask_logits(logits, torch.from_numpy(words.view(np.int32)), torch.from_numpy(rows))
        assert torch.equal(logits, expected)
