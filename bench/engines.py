"""Whoever can be measured by trials: this checkout, another revision of it, a server that runs somewhere, a recording.

An Engine is a name and a way to start it; once started it is a function from requests to figures, and every engine gets
the same requests from the same client (bench/serving.py). It is stopped when its `with` block ends.
"""

import contextlib
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from bench import serving
from bench.baseline import running_baseline
from bench.environment import ROOT, git_revision
from bench.load import Load
from bench.run import baseline_model, baseline_task, run_async
from bench.server import OnProgress, running_server
from bench.workloads import BenchRequest
from engine.config import EngineConfig
from engine.errors import UserError

RunTrial = Callable[[list[BenchRequest], Load], dict[str, Any]]  # figures under the keys of bench/metrics.py


@dataclass(frozen=True)
class Engine:
    """Something that can be started and measured."""

    name: str
    start: Callable[[OnProgress], AbstractContextManager[RunTrial]]


class RecordingEndedError(Exception):
    """A recording holds no further trial."""


def this_checkout(arguments: list[str]) -> Engine:
    """`vcli serve` with these arguments, of the code that runs now."""
    revision = git_revision()
    commit = (revision["git_revision"] or "")[:9]
    dirty = " with changes" if revision["git_dirty"] else ""
    return Engine(f"this code ({commit}{dirty})" if commit else "this code", lambda show: _served(arguments, show))


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

    name = commit[:9] if commit.startswith(revision) else f"{revision} ({commit[:9]})"
    return Engine(name, start)


def transformers_generate(engine: EngineConfig) -> Engine:
    """Plain transformers on the same weights: it tells throughput alone."""

    @contextlib.contextmanager
    def start(on_progress: OnProgress) -> Iterator[RunTrial]:
        on_progress("transformers", 0.0)
        with running_baseline(baseline_model(engine)) as run:

            def run_trial(requests: list[BenchRequest], load: Load) -> dict[str, Any]:
                return run(baseline_task(requests, engine, load.concurrency or len(requests)))

            yield run_trial

    return Engine(f"transformers {version('transformers')} generate", start)


def at_url(url: str, api_key: str = "") -> Engine:
    """A server that runs already: it is not started, and not stopped."""
    return Engine(url, lambda show: contextlib.nullcontext(_trials_at(url, api_key)))


def recording(name: str, trials: list[dict[str, Any]]) -> Engine:
    """Trials measured earlier, each given once, however often it is started."""
    rest = iter(trials)

    def run_trial(requests: list[BenchRequest], load: Load) -> dict[str, Any]:
        figures = next(rest, None)
        if figures is None:
            raise RecordingEndedError(
                f"all {len(trials)} recorded trials are used; --against REV measures as many as it takes"
            )
        return figures

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


def _trials_at(url: str, api_key: str = "") -> RunTrial:
    name = str(run_async(serving.served_model(url, api_key))["id"])

    def run_trial(requests: list[BenchRequest], load: Load) -> dict[str, Any]:
        return dict(run_async(serving.measure(url, name, requests, load, api_key=api_key)).metrics())

    return run_trial
