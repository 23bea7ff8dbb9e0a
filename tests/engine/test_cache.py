"""What is kept between runs, and where."""

import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORTS_TORCH = "import sys; from engine.cache import keep_bytecode; keep_bytecode(); import torch, os; "
PRINTS = "print(torch.__cached__); print(os.environ.get('PYTHONPYCACHEPREFIX'))"


@pytest.fixture
def torch(tmp_path: Path) -> Path:
    """Something called torch, as it comes without bytecode."""
    (tmp_path / "site" / "torch").mkdir(parents=True)
    source = tmp_path / "site" / "torch" / "__init__.py"
    source.write_text("answer = 42\n")
    return source


def run(torch: Path, **variables: str) -> list[str]:
    search_path = os.pathsep.join([str(torch.parent.parent), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": search_path, "XDG_CACHE_HOME": str(torch.parents[2] / "cache")}
    environment.pop("PYTHONPYCACHEPREFIX", None)
    command = [sys.executable, "-c", IMPORTS_TORCH + PRINTS]
    output = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True).stdout
    return output.split()


@pytest.mark.parametrize("variables", [{}, {"PYTHONDONTWRITEBYTECODE": "1"}])
def test_what_python_compiles_is_kept_where_nothing_came_compiled(torch, variables):
    cached, prefix = run(torch, **variables)
    assert Path(cached).is_file()
    assert cached.startswith(prefix)
    assert prefix == str(torch.parents[2] / "cache" / "vcli" / "bytecode")
    assert not (torch.parent / "__pycache__").exists()


def test_an_installation_with_bytecode_is_left_as_it_is(torch):
    compiled = py_compile.compile(str(torch))
    assert run(torch, PYTHONDONTWRITEBYTECODE="1") == [compiled, "None"]
