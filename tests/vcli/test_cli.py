"""The command line from outside: help, version, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ["torch", "transformers", "pandas", "numpy", "starlette", "uvicorn", "aiohttp", "zmq", "tokenizers"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["serve", "--help"],
        ["bench", "--help"],
        ["bench", "gate", "--help"],
        ["bench", "compare", "--help"],
        ["quantize", "--help"],
        ["--version"],
    ],
)
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import sys
sys.argv = ["vcli", *{arguments!r}]
from vcli.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("HEAVY", [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.rstrip().endswith("HEAVY []"), done.stdout + done.stderr


def test_help_lists_commands_and_groups_flags(vcli):
    assert "serve" in vcli("--help").stdout
    shown = vcli("serve", "--help").stdout
    assert "Engine options:" in shown
    assert "Server options:" in shown
    assert "--max-num-batched-tokens INT" in shown
    assert "--enable-prefix-caching / --no-enable-prefix-caching" in shown
    assert sum(line.startswith("  --") for line in shown.splitlines()) <= 40


def test_flags_for_experts_are_named_and_alive_but_not_explained(vcli):
    shown = " ".join(vcli("serve", "--help").stdout.split())
    assert shown.count("--step-timeout") == 1
    assert "For experts, see --print-config: --max-prefill-chunk, " in shown
    told = vcli("serve", "--step-timeout", "5s", "--print-config").stdout
    assert "step_timeout_s 5 flag" in " ".join(told.split())


def test_version_is_a_number(vcli):
    assert vcli("--version").stdout[0].isdigit()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["serve", "--dtype", "int1"], 2, "vcli: --dtype must be auto, bfloat16, float16 or float32, got 'int1'"),
        (["serve", "--max-model-len", "long"], 2, "vcli: --max-model-len must be a whole number such as"),
        (["serve", "--port", "99999"], 2, "vcli: --port must be between 0 and 65535, got 99999"),
        (["serve", "--max-num-seqs", "0"], 2, "vcli: --max-num-seqs must be at least 1, got 0"),
        (["serve", "--no-such-flag"], 2, "--no-such-flag"),
        (["quantize", "-o", "out"], 2, "vcli: say what the weights become, one of --int4, --int8 and --fp8"),
        (["quantize", "--int8", "--format", "awq"], 2, "vcli: --format awq holds 4-bit weights with zeros only"),
        (["quantize", "--int4", "--max-kl", "1", "--no-report"], 2, "vcli: --max-kl needs the report"),
        (["nonsense"], 2, "nonsense"),
        (["serve", "/no/such/model"], 1, "vcli: /no/such/model"),
        (["serve", "--chat-template", "/no/such/file"], 1, "vcli: --chat-template /no/such/file cannot be read"),
    ],
)
def test_mistake_gets_a_sentence_and_its_exit_code(vcli, arguments, code, words):
    done = vcli(*arguments)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_folder_without_a_model_is_named(tmp_path):
    command = [sys.executable, "-m", "vcli", "serve", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"vcli: {tmp_path} holds no config.json")
