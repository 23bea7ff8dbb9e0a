"""What a Hugging Face folder holds beside the weights: config, tokenizer, chat template, generation config, card."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.files import whole_file, write_json
from engine.gguf import GGUFFile
from engine.model_config import load_json
from engine.quantization.formats import Format
from engine.tokenizer_conversion import converted_tokenizer

COPIED_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt")
COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
WRITTEN_ANEW = ("config.json", "README.md", "quantize_config.json")


def read_config(source: Path) -> dict[str, Any]:
    """The config.json of a model's folder, or what it would be for a GGUF file. Raises UserError."""
    if source.suffix == ".gguf":
        return GGUFFile(source).hugging_face_config()
    return load_json(source / "config.json")


def fill(folder: Path, source: Path, config: dict[str, Any], written: Format) -> None:
    """Put all but the weights and the card into a folder: of `source`, and the config of the format."""
    for file in _companions(source):
        with whole_file(folder / file.name) as unfinished:
            shutil.copyfile(file, unfinished)
    if source.suffix == ".gguf":
        write_json(folder / "generation_config.json", _generation_config(source, config))
    quantization = written.config()
    write_json(folder / "config.json", config | {"quantization_config": quantization})
    if quantization["quant_method"] == "gptq":
        write_json(folder / "quantize_config.json", quantization)  # where AutoGPTQ looks


def write_card(folder: Path, source: Path, model: str, weights: str, report: str = "") -> None:
    """README.md: what the model was made from, what its weights are now, and `report`, Markdown of what it lost."""
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) is not None
    name = model if is_hub_name else Path(model).stem
    license_name = _front_matter(source).get("license")
    lines = [
        "---",
        *([f"license: {license_name}"] if license_name else []),
        *([f"base_model: {model}"] if is_hub_name else []),
        "tags:",
        "- vcli",
        "---",
        "",
        f"# {name}, quantized",
        "",
        f"{name} with the weights of its linear layers as {weights}, made by `vcli quantize`. `quantization.json`",
        "holds its choices and the error of each layer. `vcli serve` runs it, and so does what else knows its",
        "`quantization_config`.",
        *(["", report.strip()] if report else []),
        "",
    ]
    with whole_file(folder / "README.md") as unfinished:
        unfinished.write_text("\n".join(lines), encoding="utf-8")


def _companions(source: Path) -> Iterator[Path]:
    if source.suffix == ".gguf":
        yield from sorted(converted_tokenizer(source).iterdir())
        return
    for file in sorted(source.iterdir()):
        is_wanted = file.suffix in COPIED_SUFFIXES or file.name.startswith(COPIED_NAMES)
        is_index = file.name.endswith(".index.json")
        if file.is_file() and is_wanted and not is_index and file.name not in WRITTEN_ANEW:
            yield file


def _generation_config(source: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What lies beside a GGUF file, and the tokens that begin and end a text."""
    file = source.parent / "generation_config.json"
    beside = load_json(file) if file.is_file() else {}
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    return tokens | beside


def _front_matter(source: Path) -> dict[str, str]:
    """The plain `key: value` lines that a model card begins with."""
    card = source / "README.md"
    if not card.is_file():
        return {}
    found = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    lines = found[1].splitlines() if found else []
    return dict(line.split(": ", 1) for line in lines if re.match(r"\w+: \S", line))
