"""The folder OUT.unfinished, in which the checkpoint OUT grows part by part, whatever ends the process.

    choices.json       what is made, of what and how; nothing else may go on here
    part-00003.safetensors   the tensors of a part (embedding, layers, head), written once it is finished
    hidden-00003.safetensors what goes into the part after it, if anything looks at activations
    checkpoint/        the finished folder, put together from the parts; its new name is the last step

What has its name is whole: files are written under other names and renamed. So the parts that are there say where to go
on, and a part is made of the same inputs whether or not the process ended before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import UserError
from engine.files import UNFINISHED, rename_folder, whole_file, write_json

SHARD_BYTES = 4 << 30
REPORT = "report"  # the one key of a part's metadata: several would be written in any order


class Unfinished:
    """Owns the folder while it is open: a second process is refused. `num_finished` parts are in it."""

    def __init__(self, output: Path, choices: dict[str, Any]) -> None:
        """Raises UserError if the folder cannot be written to, or holds what other choices made."""
        self.output = output
        self.folder = _folder(output)
        self._choices = json.loads(json.dumps(choices))
        with contextlib.ExitStack() as opened:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = os.open(self.folder, os.O_RDONLY)
                opened.callback(os.close, lock)
                self._take(lock)
                self._check_choices()
            except OSError as error:
                message = f"{self.folder} cannot be written to ({error.strerror}): choose another --output"
                raise UserError(message) from None
            self._opened = opened.pop_all()
        self.num_finished = 0
        while self._part(self.num_finished).is_file():
            self.num_finished += 1

    def _take(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder}: another process is at work in it: wait for it, or end it") from None

    def _check_choices(self) -> None:
        file = self.folder / "choices.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if found is None:
            write_json(file, self._choices)
        elif found != self._choices:
            changed = sorted(key for key in found | self._choices if found.get(key) != self._choices.get(key))
            was = ", ".join(f"{key} {found.get(key)!r}" for key in changed)
            raise UserError(
                f"{self.folder} was begun with other choices ({was}): repeat them to go on, delete the folder to begin "
                "anew, or choose another --output"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def finish_part(self, tensors: dict[str, Tensor], report: Mapping[str, float], hidden: Tensor | None) -> None:
        """Keep the next part: its tensors, what is to be reported of it, and what goes into the part after it."""
        number = self.num_finished
        if hidden is not None:
            self._save(self._hidden(number), {"hidden": hidden}, {})
        self._save(self._part(number), tensors, report)
        self._hidden(number - 1).unlink(missing_ok=True)
        self.num_finished += 1

    def hidden(self, device: torch.device) -> Tensor | None:
        """What goes into the part that is next, if it was kept."""
        if not self._hidden(self.num_finished - 1).is_file():
            return None
        found = load_file(self._hidden(self.num_finished - 1))["hidden"]
        return found.to(device, copy=True)  # as aligned as a tensor of its own

    def report(self) -> dict[str, float]:
        """What was reported of all parts, in their order."""
        found: dict[str, float] = {}
        for number in range(self.num_finished):
            with safe_open(self._part(number), "pt") as part:
                found |= json.loads(part.metadata()[REPORT])
        return found

    def join_parts(self) -> Path:
        """The checkpoint's folder, with the tensors of all parts in one file, or in several and an index."""
        folder = self.folder / "checkpoint"
        folder.mkdir(exist_ok=True)
        shards = _shards([self._part(number) for number in range(self.num_finished)])
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        if len(shards) == 1:
            names = ["model.safetensors"]
        weight_map: dict[str, str] = {}
        num_bytes = 0
        for name, parts in zip(names, shards, strict=True):
            tensors = {key: tensor for part in parts for key, tensor in load_file(part).items()}
            if not (folder / name).is_file():
                with whole_file(folder / name) as unfinished:
                    save_file(tensors, unfinished, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(folder / "model.safetensors.index.json", index)
        return folder

    def finish(self) -> None:
        """Give the checkpoint its name, and remove all else."""
        rename_folder(self.folder / "checkpoint", self.output)
        remove_unfinished(self.output)

    def _save(self, file: Path, tensors: dict[str, Tensor], report: Mapping[str, float]) -> None:
        with whole_file(file) as unfinished:
            save_file(
                {name: tensor.cpu() for name, tensor in tensors.items()}, unfinished, {REPORT: json.dumps(report)}
            )

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05}.safetensors"

    def _hidden(self, number: int) -> Path:
        return self.folder / f"hidden-{number:05}.safetensors"


def remove_unfinished(output: Path) -> None:
    """What a checkpoint that is whole was made of, if it is still there."""
    shutil.rmtree(_folder(output), ignore_errors=True)


def _folder(output: Path) -> Path:
    return output.with_name(output.name + UNFINISHED)


def _shards(parts: Sequence[Path]) -> list[list[Path]]:
    """Parts side by side, in files of SHARD_BYTES at most where a part is no larger."""
    shards: list[list[Path]] = []
    room = 0
    for part in parts:
        size = part.stat().st_size
        if size > room:
            shards.append([])
            room = max(SHARD_BYTES, size)
        shards[-1].append(part)
        room -= size
    return shards
