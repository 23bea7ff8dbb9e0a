"""Numbers come out of words as they went in, and lie where the formats say."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.quantization.packing import num_words, pack, unpack


@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 20), st.randoms(use_true_random=False))
def test_what_was_packed_unpacks(bits, rows, columns, random):
    half = 1 << (bits - 1)
    numbers = torch.tensor([[random.randrange(-half, half) for _ in range(columns)] for _ in range(rows)])
    words = pack(numbers.to(torch.int8), bits)
    assert words.shape == (rows, num_words(columns, bits))
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, bits, columns), numbers.to(torch.int8))


@given(st.sampled_from([4, 8]), st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=6))
def test_any_word_is_some_numbers(bits, values):
    words = torch.tensor([values], dtype=torch.int32)
    assert torch.equal(pack(unpack(words, bits, len(values) * 32 // bits), bits), words)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_first_number_lies_lowest(bits):
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (3, 2), dtype=np.int32)
    per_word = 32 // bits
    expected = [
        [
            ((int(row[i // per_word]) >> (bits * (i % per_word))) % (1 << bits)) - (1 << (bits - 1))
            for i in range(2 * per_word)
        ]
        for row in words
    ]
    assert unpack(torch.from_numpy(words), bits, 2 * per_word).tolist() == expected


def test_words_that_are_another_s_columns():
    words = torch.arange(6, dtype=torch.int32).view(2, 3)
    assert torch.equal(unpack(words.T, 4, 16), unpack(words.T.contiguous(), 4, 16))
