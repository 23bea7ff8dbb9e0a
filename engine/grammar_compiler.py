"""From a grammar's text to what keeps tokens to it, with llguidance; the one place that knows its tokenizer and limits.

Both processes have one: the API process to refuse a bad grammar before anything runs, the engine to run it. They know
the same vocabulary and the same limits, so that what one accepts the other does. Compiling takes milliseconds mostly,
on a thread of its own. What always holds: a grammar costs no more than LIMITS, whoever wrote it.
"""

import json
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from engine.grammar import GrammarError, check_size, subschemas
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

NUM_REMEMBERED = 32  # compiled grammars, beside those in use
MAX_PLACES = 200  # schemas inside a schema that are looked at to find the wrong one
MAX_MESSAGE = 400
MAX_FIRST_MASK_S = 0.25  # of CPU time, to work out what an answer may begin with
TOO_COMPLEX = "the grammar is too complex: bound its repetitions lower, or name fewer things"
STACK_BYTES = 256 * 2**20  # of address space: grammars of 128k characters may go 10,000 names deep
LIMITS: dict[str, Any] = {  # of llguidance's LLParserLimits
    "initial_lexer_fuel": 1_000_000,  # 20 ms
    "step_lexer_fuel": 200_000,  # 15 ms
    "step_max_items": 50_000,
    "max_items_in_row": 10_000,  # an object has four for each field that may come
    "max_lexer_states": 100_000,  # 400 bytes each, shared by the sequences; four for each character of maxLength
    "max_grammar_size": 100_000,
}


class CompiledGrammar:
    """A grammar at its beginning, ready for any number of sequences.

    They share what they learn of its lexer, and the limit of that: a grammar in use for long may be worn out, and is
    compiled anew then.
    """

    def __init__(self, matcher: "LLMatcher", compile_again: Callable[[], "LLMatcher"]) -> None:
        self.num_renewals = 0
        self._matcher = matcher
        self._compile_again = compile_again

    def matcher(self) -> "LLMatcher":
        """The state of one sequence, before its first token."""
        return self._matcher.deep_copy()

    def renew(self, num_renewals: int) -> None:
        """After a sequence found it worn out that began after so many renewals; waits for the compiler."""
        if num_renewals == self.num_renewals:
            self._matcher = self._compile_again()
            self.num_renewals += 1


class GrammarCompiler:
    """Owns the grammars of one tokenizer, and the thread that compiles them. Safe to use from several threads."""

    def __init__(
        self, load_tokenizer: Callable[[], Tokenizer | None], vocab_size: int, eos_token_ids: Iterable[int]
    ) -> None:
        """load_tokenizer is called when the first grammar comes. vocab_size: the model's."""
        self._load_tokenizer = load_tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._in_use: weakref.WeakValueDictionary[str, CompiledGrammar] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[str, CompiledGrammar] = OrderedDict()  # the thread's

    def find(self, text: str) -> CompiledGrammar | None:
        """A grammar that somebody uses, or that was compiled lately."""
        return self._in_use.get(text)

    def submit(self, text: str) -> "Future[CompiledGrammar]":
        """Compile a grammar. The result raises GrammarError, which says what is wrong and, where it is known, where."""
        return (self._thread or self._start_thread()).submit(self._compile, text)

    def compile(self, text: str) -> CompiledGrammar:
        """As `submit`, waiting for it."""
        return self.submit(text).result()

    def _start_thread(self) -> ThreadPoolExecutor:
        self._thread = ThreadPoolExecutor(1, "grammars")
        usual = threading.stack_size(STACK_BYTES)
        self._thread.submit(int)
        threading.stack_size(usual)
        return self._thread

    def _compile(self, text: str) -> CompiledGrammar:
        compiled = self._in_use.get(text)
        if compiled is None:
            check_size(text)
            thread = self._thread or self._start_thread()
            compiled = CompiledGrammar(self._matcher(text), lambda: thread.submit(self._matcher, text).result())
            self._in_use[text] = compiled
        self._recent[text] = compiled
        self._recent.move_to_end(text)
        if len(self._recent) > NUM_REMEMBERED:
            self._recent.popitem(last=False)
        return compiled

    def _matcher(self, text: str) -> "LLMatcher":
        matcher = self._try(text)
        if matcher.is_error():
            message, place = matcher.get_error(), ""
            if (schema := _only_schema(text)) is not None:
                place = self._place_of_error(schema, message)
            raise GrammarError(_readable(message, place))
        start = time.thread_time()
        matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError(f"no answer can follow the grammar: {_readable(matcher.get_error())}")
        if time.thread_time() - start > MAX_FIRST_MASK_S:
            raise GrammarError(TOO_COMPLEX)
        return matcher

    def _try(self, text: str) -> "LLMatcher":
        from llguidance import LLMatcher, LLParserLimits

        self._tokenizer = self._tokenizer or self._make_tokenizer()
        return LLMatcher(self._tokenizer, text, log_level=0, limits=LLParserLimits(**LIMITS, verbose_errors=False))

    def _place_of_error(self, schema: Any, message: str) -> str:
        """The way down to the innermost schema that is refused for the same reason."""
        place, num_left = "", MAX_PLACES
        shared = {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema, dict) and key in schema}
        while True:
            for step, inner in subschemas(schema):
                num_left -= 1
                whole = inner | shared if isinstance(inner, dict) and not shared.keys() & inner.keys() else inner
                text = json.dumps({"grammars": [{"json_schema": whole}]})
                if num_left < 0:
                    return place
                if _essence(self._try(text).get_error()) == _essence(message):
                    place, schema = place + step, inner
                    break
            else:
                return place

    def _make_tokenizer(self) -> "LLTokenizer":
        from llguidance import LLTokenizer, TokenizerWrapper

        tokenizer = self._load_tokenizer()
        if tokenizer is None:
            raise GrammarError("a grammar needs the tokenizer, and --skip-tokenizer-init left it out")
        vocabulary = _Vocabulary(tokenizer, self._vocab_size, self._eos_token_ids)
        return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=vocabulary.eos_token_ids)


def import_llguidance() -> None:
    """Load now what else the first grammar would wait for."""
    import llguidance.gbnf_to_lark  # noqa: F401


class _Vocabulary:
    """A tokenizer as llguidance reads it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        known = range(min(tokenizer.vocab_size, vocab_size))
        padding = [b""] * (vocab_size - len(known))  # models have a few rows more than tokens; never allowed
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in known] + padding
        self.eos_token_ids = eos_token_ids or list(tokenizer.eos_token_ids) or [0]
        self.eos_token_id = self.eos_token_ids[0]
        self.special_token_ids = sorted(tokenizer.pieces.special_ids & set(known))

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def is_worn_out(matcher: "LLMatcher") -> bool:
    """Whether a matcher fails at what all sequences of its grammar share, and not at its own tokens."""
    return matcher.is_error() and "too many states" in matcher.get_error()


def failure_of(matcher: "LLMatcher") -> str:
    """Why a matcher fails, for people; '' if it does not."""
    return _readable(matcher.get_error()) if matcher.is_error() else ""


def _only_schema(text: str) -> Any:
    """The JSON schema, of a grammar that is nothing else."""
    if not text.startswith("{"):
        return None
    try:
        [grammar] = json.loads(text)["grammars"]
    except (ValueError, KeyError, TypeError):
        return None
    return grammar.get("json_schema") if isinstance(grammar, dict) else None


def _essence(message: str) -> str:
    return message.strip().split("\n", 1)[0]


def _readable(message: str, place: str = "") -> str:
    """llguidance's complaint in a line or two."""
    message = message.strip().removesuffix("<non-verbose/>").strip()
    if re.search(r"limits\.|limit for this grammar|too many states|items; max is", message):
        message = TOO_COMPLEX
    if "regex parse error:" in message:
        reason = message.rsplit("\nerror: ", 1)[-1].split("\n", 1)[0]
        caret = re.search(r"^    ( *)\^", message, re.MULTILINE)
        where = f" (at character {len(caret[1]) + 1:,})" if caret else ""
        message = f"the regular expression is not valid: {reason}{where}"
    message = message.replace(
        "oneOf constraints are not supported. Enable 'coerce_one_of' option to approximate oneOf with anyOf",
        "oneOf is possible only where no value can match two of its schemas: use anyOf",
    )
    message = re.sub(r"^(at )?(\d+)\((\d+)\): ", r"line \2, column \3: ", message)
    message = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "..."
    return f"at {place.removeprefix('.')[:200]}: {message}" if place else message
