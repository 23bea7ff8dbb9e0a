"""Parts of tensors come out of safetensors files as they went in, through buffers of any size and in any order."""

import json
import os
import struct
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint import Reads, StoredCheckpoint, open_checkpoint
from engine.errors import UserError
from engine.parallel.groups import Group
from engine.safetensors import SafetensorsFolder
from engine.staging import Staging

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BUFFER_BYTES = 8 * 8 * 8  # the longest row below: most tensors take several buffers, and wait for them


@st.composite
def wishes(draw: st.DrawFn) -> dict:
    """A tensor as it is stored, and what a layer asks of it."""
    size = draw(st.integers(1, 3))
    dim = draw(st.sampled_from([None, 0, 1, 2]))
    shape = draw(st.lists(st.integers(1, 8), min_size=1 if dim is None else dim + 1, max_size=3))
    if dim is not None:
        shape[dim] = size * draw(st.integers(1, 8 // size))
    before, after = draw(st.tuples(st.integers(0, 5), st.integers(0, 5))) if draw(st.booleans()) else (0, 0)
    return {
        "shape": shape, "dim": dim, "group": Group(draw(st.integers(0, size - 1)), size),
        "before": before, "after": after,  # rows of other tensors in the same one
        "stored": draw(st.sampled_from(DTYPES)), "wanted": draw(st.sampled_from(DTYPES)),
        "plus": draw(st.sampled_from([0.0, 1.0])), "file": draw(st.integers(0, 2)),
    }  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@given(asked=st.lists(wishes(), min_size=1, max_size=6), num_buffers=st.integers(1, 3), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_part_arrives_in_its_place(device, asked, num_buffers, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    files: dict[int, dict[str, Tensor]] = {}
    for i, wish in enumerate(asked):
        rows, *others = wish["shape"]
        whole = torch.randn(wish["before"] + rows + wish["after"], *others).to(wish["stored"])
        files.setdefault(wish["file"], {})[f"layer.{i}"] = whole
    for number, tensors in files.items():
        save_file(tensors, folder / f"{number}.safetensors")

    source = SafetensorsFolder(folder, partial(Staging, buffer_bytes=BUFFER_BYTES, num_buffers=num_buffers))
    reads = Reads()
    ckpt = StoredCheckpoint(source, reads).scope("layer")
    places, expected, num_bytes = [], [], 0
    for i in data.draw(st.permutations(range(len(asked)))):
        wish = asked[i]
        rows = wish["shape"][0]
        part = files[wish["file"]][f"layer.{i}"][wish["before"] : wish["before"] + rows]
        if wish["dim"] is not None:
            part = part.chunk(wish["group"].size, wish["dim"])[wish["group"].rank]
        place = torch.full(part.shape, torch.nan, dtype=wish["wanted"], device=device)  # what must not stay there
        fused = (wish["before"], len(files[wish["file"]][f"layer.{i}"])) if wish["before"] + wish["after"] else None
        ckpt.read(str(i), place, wish["dim"], wish["group"], fused, wish["plus"])
        places.append(place)
        expected.append(part.to(device, wish["wanted"]) + wish["plus"])
        num_bytes += part.nbytes
    assert sum(reads.results()) == num_bytes
    reads.close()
    source.close()
    for place, values in zip(places, expected, strict=True):
        assert torch.equal(place, values)


@pytest.mark.parametrize("device", DEVICES)
def test_a_tensor_larger_than_all_buffers_arrives(device, tmp_path):
    weights = {"big": torch.randn(1000, 700).bfloat16(), "row": torch.randn(1, 300_000).half()}
    save_file(weights, tmp_path / "model.safetensors")
    source = SafetensorsFolder(tmp_path, partial(Staging, buffer_bytes=4096, num_buffers=2))
    reads = Reads()
    big, row = torch.zeros(1000, 700, device=device).bfloat16(), torch.zeros(1, 300_000, device=device)
    half = torch.zeros(1000, 350, device=device)
    ckpt = StoredCheckpoint(source, reads)
    ckpt.read("big", big)
    ckpt.read("big", half, dim=1, group=Group(1, 2))
    ckpt.read("row", row)
    assert sum(reads.results()) == 1000 * 1050 * 2 + 300_000 * 2
    reads.close()
    source.close()
    assert torch.equal(big.cpu(), weights["big"])
    assert torch.equal(half.cpu(), weights["big"][:, 350:].float())
    assert torch.equal(row.cpu(), weights["row"].float())


# --- what goes wrong while threads read


def read(folder: Path, *names: str, first: Callable[[], object] = lambda: None) -> None:
    """Read tensors of 10 numbers; `first` happens when the files are open already."""
    with open_checkpoint(folder) as ckpt:
        first()
        for name in names:
            ckpt.read(name, torch.zeros(10))


def test_a_file_that_shrinks_while_it_is_read_ends_the_loading(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"first": torch.ones(10), "second": torch.ones(10)}, file)
    with pytest.raises(UserError, match="cut short") as caught:
        read(tmp_path, "first", "second", first=lambda: os.truncate(file, file.stat().st_size - 4))
    assert str(file) in str(caught.value)


def test_a_file_that_cannot_be_opened_is_told(tmp_path):
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "missing")
    with pytest.raises(UserError, match=r"a\.safetensors cannot be opened \(No such file"):
        read(tmp_path, "weight")


def test_a_disk_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    def broken(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    save_file({"weight": torch.ones(10)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read .*Input/output error"):
        read(tmp_path, "weight", first=lambda: monkeypatch.setattr(os, "preadv", broken))


def test_nothing_stays_open_whatever_way_loading_ends(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(10)}, file)
    num_open = len(os.listdir("/proc/self/fd"))
    read(tmp_path, "weight")
    with pytest.raises(UserError, match="no tensor bias"):
        read(tmp_path, "weight", "bias")
    with pytest.raises(UserError, match="cut short"):
        read(tmp_path, "weight", first=lambda: os.truncate(file, file.stat().st_size - 4))
    with pytest.raises(UserError, match="corrupt"):
        read(tmp_path, "weight")
    assert len(os.listdir("/proc/self/fd")) == num_open
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reading")]


# --- headers


def write(file: Path, header: object, num_bytes: int) -> Path:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * num_bytes)
    return file.parent


WEIGHT = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("header", "num_bytes"),
    [
        ({"weight": WEIGHT}, 23),  # fewer bytes than it says
        ({"weight": WEIGHT}, 25),  # more
        ({"weight": WEIGHT | {"shape": [2, 4]}}, 24),
        ({"weight": WEIGHT | {"data_offsets": [-24, 0]}}, 0),
        ({"weight": WEIGHT | {"data_offsets": [0]}}, 24),
        ({"weight": {"dtype": "F32"}}, 24),
        ({"weight": 3}, 24),
        ([WEIGHT], 24),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_called_corrupt(header, num_bytes, tmp_path):
    folder = write(tmp_path / "model.safetensors", header, num_bytes)
    with pytest.raises(UserError, match=r"model\.safetensors is corrupt or cut short"), open_checkpoint(folder):
        pass


def test_metadata_is_no_tensor(tmp_path):
    folder = write(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}, "weight": WEIGHT}, 24)
    with open_checkpoint(folder) as ckpt:
        assert ckpt.has("weight")
        assert not ckpt.has("__metadata__")
