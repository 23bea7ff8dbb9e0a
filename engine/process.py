"""The engine's own process: `python -m engine.process ADDRESS [standby]`.

It owns nothing that the API process could not rebuild: it takes typed messages from the socket, steps while there is
work, and sends tokens back. It ends when it is told to, when it fails, or when its parent is gone. A standby imports
what takes long, and waits until it is needed.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time

import setproctitle
import zmq

from engine import log, messages
from engine.child import die_with_parent
from engine.config import EngineConfig
from engine.errors import UserError
from engine.gpu import wake_gpu
from engine.timeline import process_start_time

QUIET_MS = 100  # without a request, until an idle engine captures CUDA graphs: the next one may have to wait for one
IDLE_POLL_MS = 1000  # how often an idle engine looks whether its parent is still there


def main(address: str, *, is_standby: bool = False) -> None:
    """Serve the API process behind `address` until it says stop."""
    setproctitle.setproctitle("vcli: engine standby" if is_standby else "vcli: engine 0")
    die_with_parent(signal.SIGKILL)
    log.set_up("engine", log.format_for_children())
    for number in (signal.SIGINT, signal.SIGTERM):  # the API process's to act on, also where all processes get them
        signal.signal(number, signal.SIG_IGN)
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(address)
    began = time.time()
    importing = threading.Thread(target=_import_engine, args=[is_standby], name="importing", daemon=True)
    importing.start()  # before it is known what for, which the API process tells once it has imported its own part
    if is_standby:
        importing.join()
        socket.send(messages.encode(messages.Progress("standing by", 1.0, time.time())))
    try:
        start = messages.decode_to_engine(socket.recv())
        assert isinstance(start, messages.Start), start
        setproctitle.setproctitle("vcli: engine 0")
        _serve(socket, EngineConfig(**start.config), began)
    except UserError as error:
        socket.send(messages.encode(messages.Failed(str(error))))
        sys.exit(1)
    except Exception as error:
        logging.getLogger("vcli").exception("the engine fails")
        socket.send(messages.encode(messages.Failed(f"{type(error).__name__}: {error}")))
        sys.exit(1)
    finally:
        socket.close(linger=1000)
        context.term()


def _import_engine(is_standby: bool) -> None:
    """Import torch and the engine; as a standby, out of the way of the engine that works."""
    if is_standby:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # on Linux it is the thread's own
    import engine.core  # noqa: F401


def _serve(socket: zmq.Socket, config: EngineConfig, began: float) -> None:
    """began: when the import of torch did."""

    def on_progress(stage: str, fraction: float, at: float | None = None) -> None:
        socket.send(messages.encode(messages.Progress(stage, fraction, time.time() if at is None else at)))

    on_progress("starting Python", 0.0, process_start_time())
    if config.device != "cpu":
        wake_gpu()
    on_progress("importing torch", 0.0, began)
    from engine.core import EngineCore  # waits for the import that is under way

    core = EngineCore(config, on_progress, leaves_graphs=True)
    socket.send(messages.encode(core.ready))

    def send(outputs: list[messages.TokenOutput]) -> None:
        core.stats.time = core.clock.since
        socket.send(messages.encode(messages.StepOutput(outputs, core.stats)))

    send([])  # an engine that nobody has asked yet has stages, too
    parent = os.getppid()
    while True:
        changed = False
        while not core.has_work or socket.poll(0):
            if not core.has_work:
                core.clock.enter("idle")
                if not socket.poll(QUIET_MS):
                    while core.capture_next() and not socket.poll(0):
                        pass
                    core.clock.enter("idle")  # what is captured entered a stage of steps
            if not socket.poll(IDLE_POLL_MS):
                if os.getppid() != parent:
                    sys.exit("vcli: engine: the API process is gone")
                continue
            core.clock.enter("receive")
            message = messages.decode_to_engine(socket.recv())
            changed = True
            if isinstance(message, messages.AddRequest):
                core.add(message)
            elif isinstance(message, messages.Abort):
                core.abort(message.request_ids)
                break  # to report the freed blocks
            elif isinstance(message, messages.Inspect):
                socket.send(messages.encode(core.inspect()))
            elif isinstance(message, messages.Shutdown):
                return
        num_steps = core.stats.num_steps
        outputs = core.step() if core.has_work else []
        core.clock.enter("send")
        if outputs or changed or core.stats.num_steps > num_steps:
            send(outputs)


if __name__ == "__main__":
    main(sys.argv[1], is_standby="standby" in sys.argv[2:])
