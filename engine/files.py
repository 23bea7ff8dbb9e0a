"""Files that are whole or not there: written under another name, brought to the disk, then given their own."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished"  # ends the name of what is still written


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A name to write to; what lies there is `file` when the block has ended well, and not before."""
    unfinished = file.with_name(file.name + UNFINISHED)
    yield unfinished
    unfinished.chmod(0o644)  # some libraries write for the owner alone
    _sync(unfinished)
    unfinished.replace(file)
    _sync(file.parent)


def write_json(file: Path, content: Any) -> None:
    with whole_file(file) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def rename_folder(folder: Path, name: Path) -> None:
    """All that is in a folder lies on the disk before it gets its name, which nothing or an empty folder has."""
    for inside, _, files in os.walk(folder):
        for file in files:
            _sync(Path(inside, file))
        _sync(Path(inside))
    folder.rename(name)
    _sync(name.parent)


def _sync(path: Path) -> None:
    """Have a file's content, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
