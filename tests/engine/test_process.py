"""The loop of the engine's process."""

import engine.core
from engine import messages, process
from engine.config import EngineConfig
from engine.messages import AddRequest, Shutdown, StepOutput, ToEngine
from engine.sampling_params import SamplingParams
from tests.engine.test_core import make_padded_core


class Peer:
    """Takes the place of the socket: a request is there at the second look, the end once the engine waits for it."""

    def __init__(self, request: AddRequest, events: list[str]) -> None:
        self.request, self.events = request, events
        self.num_looks = 0
        self.inbox: list[ToEngine] = []
        self.received: list[messages.FromEngine] = []

    def poll(self, timeout_ms: int) -> bool:
        self.num_looks += 1
        if self.num_looks == 2:
            self.inbox.append(self.request)
        elif timeout_ms == process.IDLE_POLL_MS and not self.inbox:
            self.inbox.append(Shutdown())
        return bool(self.inbox)

    def recv(self) -> bytes:
        self.events.append(type(self.inbox[0]).__name__)
        return messages.encode(self.inbox.pop(0))

    def send(self, message: bytes) -> None:
        self.received.append(messages.decode_from_engine(message))


def test_an_idle_engine_captures_what_is_left_and_a_request_waits_for_one_graph_at_most(tiny_checkpoint, monkeypatch):
    folder, events = tiny_checkpoint("llama"), []
    core = make_padded_core(folder, monkeypatch)
    core.clock.spans = []
    capture_next = core.capture_next
    monkeypatch.setattr(core, "capture_next", lambda: capture_next() and not events.append("capture"))
    monkeypatch.setattr(engine.core, "EngineCore", lambda config, on_progress, *, leaves_graphs: core)
    num_left = sum(len(graphs.waiting) for graphs in core.worker.runner.graphs)
    peer = Peer(AddRequest("r", [5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True)), events)
    process._serve(peer, EngineConfig(model=str(folder), device="cpu"), began=0.0)
    assert core.clock.spans[-1][0] == "idle", "until the last message, and not what a capture has entered"
    assert events == ["capture", "AddRequest", *["capture"] * (num_left - 1), "Shutdown"]
    outputs = [output for message in peer.received if isinstance(message, StepOutput) for output in message.outputs]
    assert sum(len(output.token_ids) for output in outputs) == 3
