"""Quantized GGUF types are read as llama.cpp's ggml-quants.c works them out, block by block, number by number."""

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.gguf import GGUFFile


def half(block: bytes, at: int) -> float:
    return float(np.frombuffer(block, "<f2", 1, at)[0])


def q4_0(block: bytes) -> Iterator[float]:
    for shift in (0, 4):
        yield from (half(block, 0) * ((byte >> shift & 15) - 8) for byte in block[2:])


def q4_1(block: bytes) -> Iterator[float]:
    for shift in (0, 4):
        yield from (half(block, 0) * (byte >> shift & 15) + half(block, 2) for byte in block[4:])


def q8_0(block: bytes) -> Iterator[float]:
    yield from (half(block, 0) * int(q) for q in np.frombuffer(block, np.int8, 32, 2))


def q4_k(block: bytes) -> Iterator[float]:
    """Eight times 32 numbers, whose scales and least numbers have 6 bits each, in 12 bytes."""
    packed, quants = block[4:16], block[16:]
    for part in range(8):
        if part < 4:
            scale, least = packed[part] & 63, packed[part + 4] & 63
        else:
            scale = packed[part + 4] & 15 | packed[part - 4] >> 6 << 4
            least = packed[part + 4] >> 4 | packed[part] >> 6 << 4
        for byte in quants[part // 2 * 32 :][:32]:
            yield half(block, 0) * scale * (byte >> part % 2 * 4 & 15) - half(block, 2) * least


def q6_k(block: bytes) -> Iterator[float]:
    """Sixteen times 16 numbers with scales of 8 bits; a number's lower 4 bits and upper 2 lie apart."""
    scales = np.frombuffer(block, np.int8, 16, 192)
    for i in range(256):
        part, place = divmod(i % 128, 32)
        low = block[i // 128 * 64 + part % 2 * 32 + place] >> part // 2 * 4 & 15
        high = block[128 + i // 128 * 32 + place] >> part * 2 & 3
        yield half(block, 208) * int(scales[i // 16]) * ((low | high << 4) - 32)


TYPES: dict[str, tuple[Callable[[bytes], Iterator[float]], tuple[int, ...]]] = {  # and where a block has 16-bit scales
    "Q4_0": (q4_0, (0,)),
    "Q4_1": (q4_1, (0, 2)),
    "Q8_0": (q8_0, (0,)),
    "Q4_K": (q4_k, (0, 2)),
    "Q6_K": (q6_k, (208,)),
}


@pytest.mark.parametrize("name", TYPES)
def test_a_quantized_tensor_holds_what_its_blocks_say(name, tmp_path):
    kind, (decode, scales_at) = gguf.GGMLQuantizationType[name], TYPES[name]
    numbers, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(3)
    blocks = generator.integers(0, 256, (4 * 512 // numbers, num_bytes), dtype=np.uint8)  # any bits are numbers
    for at in scales_at:
        scales = generator.normal(size=len(blocks)).astype("<f2")
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    expected = np.array([list(decode(block.tobytes())) for block in blocks]).reshape(4, 512)
    assert np.abs(expected).max() > 1

    file = write(tmp_path / "model.gguf", blocks.reshape(4, -1), kind)
    found, num_read = GGUFFile(file).whole("model.layers.0.mlp.down_proj.weight")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert num_read == blocks.nbytes


def write(path: Path, rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_down.weight", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
