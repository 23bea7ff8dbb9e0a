"""Memory for weights: pieces of slabs that do not overlap and outlive the one who hands them out."""

import gc

import torch

from engine.layers.host_memory import SLAB_BYTES, HostMemory


def test_pieces_lie_apart_and_on_cache_lines():
    memory = HostMemory()
    pieces = [memory.empty((i, 7), torch.bfloat16) for i in range(40)]
    for i, piece in enumerate(pieces):
        assert piece.shape == (i, 7)
        assert piece.is_contiguous()
        piece.fill_(i)
    assert all((piece == i).all() for i, piece in enumerate(pieces))
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces[1:])


def test_a_piece_larger_than_a_slab_has_one_of_its_own():
    memory = HostMemory()
    small, large = memory.empty((4,), torch.float32), memory.empty((SLAB_BYTES // 4 + 1,), torch.float32)
    del memory
    gc.collect()
    small.fill_(1)
    large[-1] = 2
    assert small.sum() == 4
    assert large[-1] == 2
