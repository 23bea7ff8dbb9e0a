"""Oracle: transformers' apply_chat_template."""

from pathlib import Path

import pytest
import tokenizers

from engine.chat_template import render_chat

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_LIKE = """{{- bos_token }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{%- set loop_messages = messages %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<<" + system + ">>\\n" }}
{% for message in loop_messages %}
    {% if message.role == 'skip' %}{% continue %}{% endif %}
    {% generation %}
    {{ message.role }}: {{ message.content | tojson }} {{ message.get('name', 'nobody') }}
    {% endgeneration %}
    {% if loop.last %}{{ eos_token }}{% break %}{% endif %}
{% endfor %}
{% set ns = namespace(count=0) %}{% for m in messages %}{% set ns.count = ns.count + 1 %}{% endfor %}{{ ns.count }}
{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}"""
DATED = "Today is {{ strftime_now('%Y') }}. {{ dict(a=1) }} {% for m in messages %}{{ m.content }}{% endfor %}"
TEMPLATES = {"chatml": CHATML, "llama-like": LLAMA_LIKE, "dated": DATED}

CONVERSATIONS = [
    [{"role": "user", "content": "Is 1 < 2 & 'x' > \"y\"? ünïcode 🙂"}],
    [
        {"role": "system", "content": "  Be short.  "},
        {"role": "user", "content": "hello\n\nworld", "name": "Ann"},
        {"role": "skip", "content": "not this"},
        {"role": "assistant", "content": ""},
    ],
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one message", "with system"])
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False, "tools": [TOOL], "enable_thinking": True}])
def test_prompts_equal_those_of_transformers(template: str, messages: list, options: dict):
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    options = {"add_generation_prompt": True, **options}
    expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    assert render_chat(template, messages, bos_token="<s>", eos_token="</s>", **options) == expected


def test_the_folder_of_a_tiny_model_has_a_template_that_works(tiny_checkpoint):
    from engine.tokenizer import Tokenizer

    folder: Path = tiny_checkpoint("llama")
    template = Tokenizer.load(str(folder)).chat_template
    assert template is not None
    assert render_chat(template, [{"role": "user", "content": "hi"}]).startswith("<|im_start|>user\nhi<|im_end|>")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused the conversation: roles must alternate"),
        ("{{ messages[0].nothing.at.all }}", "refused the conversation: .*no attribute 'nothing'"),
        ("{{ 1 + 'a' }}", "refused the conversation: unsupported operand"),
        ("{% for %}", r"does not parse: .* \(line 1\)"),
        ("{{ messages.append(1) }}", "refused the conversation: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "refused the conversation: .*unsafe"),
        ("{{ range(10**9) | list }}", "refused the conversation: Range too big"),
    ],
)
def test_a_template_that_fails_is_the_callers_error(template: str, words: str):
    with pytest.raises(ValueError, match=words):
        render_chat(template, [{"role": "user", "content": "hi"}])


def test_a_template_sees_plain_data_only():
    with pytest.raises(ValueError, match="must be plain JSON data"):
        render_chat(CHATML, [{"role": "user", "content": object()}])
