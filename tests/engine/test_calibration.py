"""What a model is calibrated with: pieces of a text, half of them as conversations where the model holds any."""

import pytest

from engine.calibration import sample_tokens
from engine.hub import resolve_model
from engine.quantization.recipe import Recipe
from engine.quantize import TEXT
from engine.tokenizer import Tokenizer

RECIPE = Recipe(int4=True, samples=4, seq_len=128)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(str(resolve_model("")))


def test_every_second_sample_is_a_conversation_in_the_models_own_template(tokenizer):
    text = TEXT.read_text()
    samples = sample_tokens(tokenizer, text, RECIPE).tolist()
    assert [len(sample) for sample in samples] == [128] * 4
    prose, conversation = (tokenizer.decode(sample, skip_special_tokens=False) for sample in samples[:2])
    assert prose in text
    assert conversation.startswith("<|im_start|>system\n")
    _, user, assistant = conversation.split("<|im_start|>", 3)[1:]
    assert user.startswith("user\n")
    assert user.removeprefix("user\n").removesuffix("<|im_end|>\n") in text
    assert assistant.removeprefix("assistant\n") in text


def test_a_model_without_conversations_or_whose_template_refuses_them_sees_prose_alone(tokenizer):
    text = TEXT.read_text()
    for template in (None, "{{ raise_exception('no') }}", "nothing"):
        silent = Tokenizer(tokenizer._backend, chat_template=template)
        samples = sample_tokens(silent, text, RECIPE).tolist()
        assert all(silent.decode(sample) in text for sample in samples)
