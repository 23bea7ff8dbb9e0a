"""Servers for the tests: real processes on free ports, most of them with an engine that repeats the prompt."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from engine.child import module_environment
from tests.conftest import save_tokenizer
from vcli.cli import main

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str
    log_file: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def engine(self) -> psutil.Process:
        """The process that has the model: the oldest child."""
        return min(psutil.Process(self.process.pid).children(), key=psutil.Process.create_time)

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def get(self, path: str, **arguments: object) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **arguments)  # type: ignore[arg-type]

    def post(self, path: str, **arguments: object) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **arguments)  # type: ignore[arg-type]

    def metric(self, name: str) -> float:
        """The sum over the labels of a metric."""
        lines = [line for line in self.get("/metrics").text.splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def wait_until(self, is_so: Callable[[], bool], timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def wait_ready(self) -> "Server":
        self.wait_until(self._is_ready, START_TIMEOUT_S)
        return self

    def wait_http(self) -> "Server":
        self.wait_until(lambda: self._status("/health") is not None, START_TIMEOUT_S)
        return self

    def end(self, signal_number: int = signal.SIGTERM) -> int:
        self.process.send_signal(signal_number)
        return self.process.wait(30)

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log
        return self._status("/ready") == 200

    def _status(self, path: str) -> int | None:
        try:
            return self.get(path).status_code
        except httpx.TransportError:
            return None


StartServer = Callable[..., Server]
Vcli = Callable[..., subprocess.CompletedProcess[str]]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def vcli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Vcli:
    """vcli(*arguments): a command as a shell would run it, but in this process, which has its imports behind it."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["vcli", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            main()
        return subprocess.CompletedProcess(command, int(stop.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that only the fake engine can run: a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[StartServer]:
    """start_server(*flags, **environment): `vcli serve` with the fake engine, or with `model=...` the real one.

    `script` stands for `vcli` instead.
    """
    started: list[Server] = []

    def start(
        *flags: str, model: Path | None = None, script: Path | None = None, port: int | None = None, **environment: str
    ) -> Server:
        script = script or (None if model else Path(__file__).with_name("serve_with_fake_engine.py"))
        command = [sys.executable, str(script)] if script else [sys.executable, "-m", "vcli"]
        port = port or free_port()
        log_file = tmp_path_factory.mktemp("server") / "log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [*command, "serve", str(model or model_folder), "--port", str(port), *flags],
                cwd=ROOT,
                env=module_environment() | {"OMP_NUM_THREADS": "1"} | environment,
                stdout=log,
                stderr=log,
            )
        started.append(Server(process, f"http://127.0.0.1:{port}", log_file))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.terminate()
    for server in started:
        server.process.wait(30)
