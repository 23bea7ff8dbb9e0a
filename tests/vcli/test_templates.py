"""Templates that try to take the server with them, and some that do not."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import psutil
import pytest

from engine.chat_template import render_chat
from vcli.server import templates
from vcli.server.template_process import MAX_MEMORY_BYTES
from vcli.server.templates import Templates

HELLO = [{"role": "user", "content": "hellö \U0001f642"}]
USUAL = "{{ bos_token }}{{ extra }}{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
DOUBLED = "{% set x %}{{ x }}{{ x }}{% endset %}"


def with_templates(story: Callable[[Templates], Awaitable[None]]) -> None:
    async def run() -> None:
        rendered = Templates()
        try:
            await asyncio.wait_for(story(rendered), 60)
        finally:
            await rendered.close()

    asyncio.run(run())


def test_a_prompt_is_what_the_template_makes_anywhere_else():
    async def story(rendered: Templates) -> None:
        conversations = [[{"role": "user", "content": "x" * length}] for length in (0, 1, 100_000, 5_000_000)]
        variables = {
            "bos_token": "<s>",
            "add_generation_prompt": False,
            "extra": {"a": [1, None, 0.5, 10**30, -(10**30)]},
        }
        for messages in [HELLO, *conversations]:
            assert await rendered.render(USUAL, messages=messages, **variables) == render_chat(
                USUAL, messages, **variables
            )
        all_at_once = [rendered.render("{{ messages[0].content }}", messages=[{"content": str(n)}]) for n in range(50)]
        assert await asyncio.gather(*all_at_once) == [str(n) for n in range(50)]
        for bad, words in (("{{ raise_exception('no') }}", "refused the conversation: no"), ("{% x %}", "parse")):
            with pytest.raises(ValueError, match=words):
                await rendered.render(bad, messages=HELLO)

    with_templates(story)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "did not end within 0.5 s"),
        ("{% macro f(n) %}{{ f(n) ~ f(n) }}{% endmacro %}{{ f(1) }}", "refused the conversation"),
        ("{{ 9 ** (9 ** 9) }}", "did not end within"),
        ("{% set a = [[1]] * 40 %}" + "{% set a = [a, a] %}" * 40 + "{{ a == a }}{{ a }}", "did not end|memory|ended"),
        ("{{ 'a' * 10 ** 11 }}", "too much memory"),
        ("{{ 'a' | center(10 ** 11) }}", "too much memory"),
        ("{{ '%100000000000d' % 1 }}", "too much memory"),
        ("{{ '{:>99999999999}'.format(1) }}", "too much memory|refused"),
        ("{% set x = 'abcdefgh' %}" + DOUBLED * 40 + "{{ x }}", "too much memory"),
        ("{{ 'a' * 2 ** 22 }}", "made a prompt of 4 MiB"),
    ],
)
def test_a_template_without_measure_ends_alone(monkeypatch: pytest.MonkeyPatch, template: str, words: str):
    monkeypatch.setattr(templates, "TIMEOUT_S", 0.5 if "did not end" in words else 10)
    monkeypatch.setattr(templates, "MAX_REPLY_BYTES", 2**21)

    async def story(rendered: Templates) -> None:
        await rendered.render(USUAL, messages=HELLO)
        num_turns = 0
        task = asyncio.create_task(rendered.render(template, messages=HELLO))
        while not task.done():
            await asyncio.sleep(0.005)
            num_turns += 1
        with pytest.raises(ValueError, match=words) as caught:
            task.result()
        assert num_turns >= 10 or "did not end" not in str(caught.value), "the event loop goes on"
        monkeypatch.setattr(templates, "TIMEOUT_S", 10)
        assert "hell" in await rendered.render(USUAL, messages=HELLO), "the next one finds a process that works"

    with_templates(story)


def the_process() -> psutil.Process:
    """The one that renders, among whatever other tests have left behind."""
    [process] = [child for child in psutil.Process().children() if "template" in " ".join(child.cmdline())]
    return process


def test_the_process_can_open_nothing_has_so_much_memory_and_knows_no_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VCLI_API_KEY", "a-secret")
    monkeypatch.setenv("HF_TOKEN", "a-secret")

    async def story(rendered: Templates) -> None:
        await rendered.render(USUAL, messages=HELLO)
        process = the_process()
        assert process.rlimit(psutil.RLIMIT_NOFILE) == (0, 0)
        assert process.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
        assert process.rlimit(psutil.RLIMIT_AS) == (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES)
        assert not process.net_connections()
        assert "a-secret" not in process.environ().values()
        await rendered.close()
        assert not process.is_running()

    with_templates(story)


def test_what_is_nested_too_deeply_is_refused():
    async def story(rendered: Templates) -> None:
        for depth in (1, 100, 300, 1000, 3000, 100_000):
            nested: list = []
            for _ in range(depth):
                nested = [nested]
            with contextlib.suppress(ValueError):  # or it is rendered
                await rendered.render("{{ extra | tojson }}", messages=HELLO, extra=nested)
        assert await rendered.render("a", messages=HELLO) == "a"

    with_templates(story)


def test_a_caller_that_gives_up_leaves_no_reply_for_the_next():
    async def story(rendered: Templates) -> None:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(rendered.render("{{ 'a' * 10 ** 8 }}", messages=HELLO), 0.05)
            assert await rendered.render("mine", messages=HELLO) == "mine"

    with_templates(story)


def test_a_killed_process_is_replaced():
    async def story(rendered: Templates) -> None:
        assert await rendered.render("a", messages=HELLO) == "a"
        process = the_process()
        process.kill()
        with pytest.raises(ValueError, match="ended the process"):
            await rendered.render("b", messages=HELLO)
        assert await rendered.render("c", messages=HELLO) == "c"

    with_templates(story)
