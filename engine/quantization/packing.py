"""Integers of 4 and 8 bits side by side in int32 words, as every checkpoint format stores them.

The first number of a word lies in its lowest bits. Each is stored unsigned, with half of what the bits can count added:
-8 to 7 become 0 to 15.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Numbers [rows, columns], int8, as words [rows, num_words(columns, bits)], int32. A last word is filled with 0."""
    unsigned = numbers.view(torch.uint8) + (1 << (bits - 1))  # modulo 256
    padded = F.pad(unsigned, (0, -numbers.shape[1] % (32 // bits)))
    if bits == 4:
        padded = padded[:, 0::2] | padded[:, 1::2] << 4
    return padded.reshape(-1).view(torch.int32).view(len(numbers), -1)


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The first `columns` numbers of each row of words [rows, num_words(columns, bits)], int8. Inverse of `pack`."""
    unsigned = words.reshape(-1).view(torch.uint8).view(len(words), -1)
    if bits == 4:
        unsigned = torch.stack((unsigned & 15, unsigned >> 4), dim=-1).flatten(1)
    return (unsigned[:, :columns] - (1 << (bits - 1))).view(torch.int8)


def num_words(length: int, bits: int) -> int:
    """The words of a row of so many numbers."""
    return -(-length * bits // 32)
