"""The weights of a GGUF file as a folder of safetensors in bf16, for engines that read no GGUF; kept in the cache."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from engine.cache import cache_folder
from engine.child import module_command, module_environment
from engine.errors import UserError


def folder_of(file: Path) -> Path:
    """Where the folder is, or will be."""
    facts = f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}"
    return cache_folder("folders") / f"{file.stem}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"


def make_folder(file: Path) -> None:
    """Write it, in a process of its own, unless it is there. Raises UserError."""
    folder = folder_of(file)
    if folder.is_dir():
        return
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    command = module_command("bench.gguf_folder", str(file.resolve()), str(unfinished))
    done = subprocess.run(command, env=module_environment(), capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"{file} cannot be written as a folder: {done.stderr.strip().splitlines()[-1]}")
    unfinished.rename(folder)


def _write(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from bench.baseline import load_transformers

    model = load_transformers(file, "auto", torch.device("cpu"), torch.bfloat16)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    _write(Path(sys.argv[1]), Path(sys.argv[2]))
