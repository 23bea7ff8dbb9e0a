"""Grammars made to end or hold up the process that compiles them: `python tests/engine/hostile_grammars.py`."""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.grammar import GrammarError, choice_grammar, json_grammar, lark_grammar, regex_grammar
from engine.grammar_compiler import GrammarCompiler
from engine.tokenizer import Tokenizer
from tests.conftest import save_tokenizer


def grammars() -> Iterator[str]:
    for letter, num in (("a", 10_000), ("A", 9_500)):  # rules, and terminals
        chain = "".join(f"{letter}{i:x}:{letter}{i + 1:x}\n" for i in range(num)).upper()
        chain = chain if letter == "A" else chain.lower()
        yield f"start: {letter}0\n{chain}" + f'{letter}{num:x}:"a"\n'.replace('"A"', '"a"')
    refs = "".join(f'"{i:x}":{{"$ref":"#/$defs/{i + 1:x}"}},' for i in range(4_000))
    yield 'start: %json {"$defs":{' + refs + '"fa0":{}},"$ref":"#/$defs/0"}'
    doubled = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)}
    yield json_grammar({"$defs": doubled | {"d60": {"type": "object"}}, "$ref": "#/$defs/d0"})
    yield json_grammar({"allOf": [{"anyOf": [{"required": [f"{i}_{j}"]} for j in range(4)]} for i in range(12)]})
    yield json_grammar({"enum": [f"value {i}" for i in range(5_000)]})
    yield json_grammar({"type": "string", "minLength": 10**9, "maxLength": 10**9})
    yield json_grammar({"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}})
    yield json_grammar({"type": "integer", "multipleOf": 99_991})
    yield json_grammar({"type": "object", "required": [f"p{i}" for i in range(3_000)]})
    yield json_grammar({"const": "\x00\ud800"})
    for regex in (
        "(a|b|c)*a(a|b|c){400}",
        "(.*a){50}.{300}",
        "(a?){5000}a{5000}",
        r"\p{L}{1,5000}",
        "a" + "?" * 99_999,
    ):
        yield regex_grammar(regex)
    yield regex_grammar("|".join(f"a{i}" for i in range(15_000)))
    yield choice_grammar(["x" * i + "y" for i in range(1, 400)])
    yield "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(60)) + 'A60: "a"\n'
    yield "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(60)) + 'a60: "a"\n'
    yield 'start: a{1,1000000000}\na: ("b" "c"){1000000000}'
    yield "start: A\nA: /(a|b)*a(a|b){14}/ & ~/(a|b)*b(a|b){12}/\n"
    yield "start: a\na: a a | \n"
    yield lark_grammar("root ::= " + "a " * 40_000 + '\na ::= "x"')
    yield json.dumps({"grammars": [{"lark_grammar": "start: @b"}, {"name": "b", "lark_grammar": "start: @b"}]})
    yield from ("", "{", '{"grammars": 5}', '{"grammars": []}', "%import /etc/passwd", "start: %json {", "start: <[9]>")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        tokenizer = Tokenizer.load(folder)
    compiler = GrammarCompiler(lambda: tokenizer, 512, [2])
    for index, text in enumerate(grammars()):
        start = time.process_time()
        try:
            matcher = compiler.compile(text).matcher()
            for token_id in tokenizer.encode("aaaaaaaaaab"):
                matcher.compute_bitmask()
                matcher.consume_token(token_id)
        except GrammarError:
            pass
        print(index, round(time.process_time() - start, 2), text[:40].replace("\n", " "), flush=True)
    print("survived")


if __name__ == "__main__":
    main()
