"""A tokenizer of another kind (inside a GGUF file, sentencepiece, tiktoken) becomes a folder with tokenizer.json.

Made once by transformers, in a child process so that nobody else carries its imports, and kept on disk under a key of
the source's files. A folder appears there whole or not at all.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from engine.cache import cache_folder
from engine.child import module_command, module_environment
from engine.errors import UserError

CACHE_VERSION = 1  # counts up when the conversion changes
SOURCE_NAMES = ("vocab.json", "vocab.txt", "tekken.json", "tokenizer_config.json")
SOURCE_SUFFIXES = (".model", ".tiktoken")


def converted_tokenizer(path: Path) -> Path:
    """The folder with tokenizer.json and chat template for a GGUF file or a model folder that has none."""
    sources = _source_files(path)
    if not sources:
        raise UserError(
            f"{path} has no tokenizer (tokenizer.json, tokenizer.model, ...): "
            "name another one with --tokenizer, or serve token ids with --skip-tokenizer-init"
        )
    cached = cache_folder("tokenizers") / _key(sources)
    if not (cached / "tokenizer.json").is_file():
        _make(path, cached)
    return cached


def _source_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.iterdir() if file.name in SOURCE_NAMES or file.suffix in SOURCE_SUFFIXES)


def _key(sources: list[Path]) -> str:
    """Changes when one of the files does."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sources]
    return hashlib.sha256(json.dumps([CACHE_VERSION, stats]).encode()).hexdigest()[:32]


def _make(path: Path, cached: Path) -> None:
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".making-", dir=cached.parent))
    except OSError as error:
        raise UserError(f"cannot write to {cached.parent} ({error.strerror}): set XDG_CACHE_HOME") from error
    try:
        _run_conversion(path, made)
        os.rename(made, cached)
    except OSError:
        if not (cached / "tokenizer.json").is_file():  # otherwise somebody else was first, with the same result
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _run_conversion(path: Path, into: Path) -> None:
    command = module_command("engine.tokenizer_conversion", str(path), str(into))
    run = subprocess.run(command, env=module_environment(), capture_output=True, text=True)
    if run.returncode == 0 and (into / "tokenizer.json").is_file():
        return
    reason = run.stderr.strip().rpartition("\n")[2] or "it has no fast form"
    raise UserError(
        f"the tokenizer of {path} cannot be read ({reason}): "
        "name another one with --tokenizer, or serve token ids with --skip-tokenizer-init"
    )


def main(source: str, into: str) -> None:
    from transformers import AutoTokenizer

    path = Path(source)
    if path.is_file():
        converted = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    else:
        converted = AutoTokenizer.from_pretrained(path)
    converted.save_pretrained(into)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:  # the parent shows the last line
        sys.exit(" ".join(str(error).split()) or type(error).__name__)
