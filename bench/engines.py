"""Whoever can be measured by trials: this code, another revision, engines of other projects, a URL, a recording.

An Engine is a name and a way to start it; once started it is a function from requests to a trial, and every engine gets
the same requests from the same client (bench/serving.py). It is stopped when its `with` block ends.
"""

import contextlib
import io
import os
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import serving
from bench.adapters import ADAPTERS, python_of
from bench.baseline import running_baseline
from bench.environment import ROOT, git_revision, gpus
from bench.gguf_folder import folder_of, make_folder
from bench.load import Load
from bench.run import baseline_model, baseline_task, served_model
from bench.run_async import run_async
from bench.server import HOST, OnProgress, answers, free_port, running_process, running_server
from bench.workloads import BenchRequest
from engine.config import EngineConfig
from engine.errors import UserError
from engine.hub import resolve_model


@dataclass(frozen=True)
class Trial:
    """What one run of the requests showed."""

    metrics: dict[str, Any]  # figures under the keys of bench/metrics.py
    samples: dict[str, Any] | None = None  # what they were made from (ServingRun.samples)


RunTrial = Callable[[list[BenchRequest], Load], Trial]


@dataclass(frozen=True)
class Engine:
    """Something that can be started and measured."""

    name: str
    start: Callable[[OnProgress], AbstractContextManager[RunTrial]]
    version: str | None = None
    command: str = ""  # that starts its server
    takes_token_ids: bool = True  # else prompts must be text
    note: str = ""  # what is not as with the others
    is_running: bool = False  # already, started by somebody else

    @property
    def title(self) -> str:
        return f"{self.name} ({self.version})" if self.version else self.name


DEFAULT_PORT = 8000  # in a command that is shown


class NotInstalledError(UserError):
    """There is no such engine on this machine."""


class RecordingEndedError(Exception):
    """A recording holds no further trial."""


def this_checkout(arguments: list[str], name: str = "this code") -> Engine:
    """`vcli serve` with these arguments, of the code that runs now."""
    revision = git_revision()
    commit = (revision["git_revision"] or "unknown revision")[:9]
    version = commit + (" with changes" if revision["git_dirty"] else "")
    command = shlex.join(["vcli", "serve", *arguments])
    return Engine(name, lambda show: _served(arguments, show), version=version, command=command)


def other_revision(revision: str, arguments: list[str]) -> Engine:
    """`vcli serve` of another commit of this checkout, with the same arguments and the same installed packages."""
    commit = find_commit(revision)

    @contextlib.contextmanager
    def start(on_progress: OnProgress) -> Iterator[RunTrial]:
        with tempfile.TemporaryDirectory(prefix=f"vcli-{commit[:9]}-") as folder:
            packed = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
            with tarfile.open(fileobj=io.BytesIO(packed)) as tree:
                tree.extractall(folder, filter="data")
            with _served(arguments, on_progress, {"PYTHONPATH": folder}) as run_trial:
                yield run_trial

    return Engine("revision" if commit.startswith(revision) else revision, start, version=commit[:9])


def peer(name: str, engine: EngineConfig, environment: Path | None) -> Engine:
    """The server of another project (bench/adapters.py), of its own virtual environment or of this one.

    Raises UserError, when it is started, where it is not installed or does not come up.
    """
    adapter, python = ADAPTERS[name], python_of(environment)
    has_gpu = engine.device != "cpu" and gpus()["gpu"] is not None
    path = resolve_model(engine.model, engine.revision).resolve()
    model = str(folder_of(path) if path.suffix == ".gguf" else path)
    installed = adapter.version(python)
    if installed is not None and path.suffix == ".gguf":
        make_folder(path)  # now: it is no part of the engine's start

    def argv(port: int) -> list[str]:
        return adapter.argv(engine, python, model, port, has_gpu)

    @contextlib.contextmanager
    def start(on_progress: OnProgress) -> Iterator[RunTrial]:
        if installed is None:
            where = f"in {environment}" if environment else "beside vcli"
            raise NotInstalledError(f"{adapter.package} is not installed {where}: --env {name}=PATH says where it is")
        on_progress(name, 0.0)
        port = free_port()
        url = f"{HOST}:{port}"
        with running_process(argv(port), {**os.environ, "PYTHONSAFEPATH": "1"}, lambda: answers(url + adapter.ready)):
            yield _trials_at(url, model=served_name(url, model), fields=adapter.fields)

    unsaid = adapter.unsaid(engine)
    return Engine(
        name,
        start,
        version=installed,
        command=shlex.join(argv(DEFAULT_PORT)),
        takes_token_ids=adapter.takes_token_ids,
        note=f"has no flag for {', '.join(unsaid)}" if unsaid else "",
    )


def served_name(url: str, model: str) -> str:
    """What the server calls the model; a server that lists none goes by what it was started with."""
    try:
        return str(served_model(url)["id"])
    except UserError:
        return model


def transformers_generate(engine: EngineConfig) -> Engine:
    """Plain transformers on the same weights: it tells throughput alone."""

    @contextlib.contextmanager
    def start(on_progress: OnProgress) -> Iterator[RunTrial]:
        on_progress("transformers", 0.0)
        with running_baseline(baseline_model(engine)) as run:

            def run_trial(requests: list[BenchRequest], load: Load) -> Trial:
                figures = run(baseline_task(requests, engine, load.concurrency or len(requests)))
                return Trial({**figures, "completed": len(requests), "failed": 0})

            yield run_trial

    return Engine("transformers' generate", start, version=version("transformers"))


def at_url(url: str, api_key: str = "") -> Engine:
    """A server that runs already: it is not started, and not stopped."""
    return Engine(url, lambda show: contextlib.nullcontext(_trials_at(url, api_key)), is_running=True)


def recording(name: str, trials: list[dict[str, Any]]) -> Engine:
    """Trials measured earlier, each given once, however often it is started."""
    rest = iter(trials)

    def run_trial(requests: list[BenchRequest], load: Load) -> Trial:
        figures = next(rest, None)
        if figures is None:
            raise RecordingEndedError(
                f"all {len(trials)} recorded trials are used; --against REV measures as many as it takes"
            )
        return Trial(figures)

    return Engine(name, lambda show: contextlib.nullcontext(run_trial))


def find_commit(revision: str) -> str:
    """The full name of a commit of this checkout. Raises UserError when there is none."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        raise UserError(
            f"{revision!r} is no revision of {ROOT}: name a commit, branch or tag of a git checkout of vcli, or the "
            "URL of a server"
        ) from None


@contextlib.contextmanager
def _served(
    arguments: list[str], on_progress: OnProgress, environment: dict[str, str] | None = None
) -> Iterator[RunTrial]:
    with running_server(arguments, on_progress, environment) as url:
        yield _trials_at(url)


def _trials_at(url: str, api_key: str = "", model: str = "", fields: dict[str, Any] | None = None) -> RunTrial:
    name = model or str(served_model(url, api_key)["id"])

    def run_trial(requests: list[BenchRequest], load: Load) -> Trial:
        run = run_async(serving.measure(url, name, requests, load, api_key=api_key, extensions=fields))
        return Trial(run.metrics(), run.samples())

    return run_trial
