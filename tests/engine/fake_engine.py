"""Speaks the engine's side of the messages without a model: it repeats the prompt, one token a step.

A prompt that begins with one of the ids below makes it do something else. Its stats tell what it was asked: num_running
and num_waiting are the sequences it runs, num_preemptions the ones it was told to abort.
"""

import os
import sys
import time

import zmq

from engine import messages

VOCAB_SIZE, MAX_MODEL_LEN = 512, 64
DIES, FAILS, STOPS, KILLS_ITSELF, HANGS = 501, 502, 503, 504, 505  # first prompt token


def main(address: str, mode: str, *, is_standby: bool) -> None:
    socket = zmq.Context().socket(zmq.PAIR)
    socket.connect(address)
    if is_standby:
        socket.send(messages.encode(messages.Progress("standing by", 1.0, time.time())))
    start = messages.decode_to_engine(socket.recv())
    assert isinstance(start, messages.Start)
    if mode == "dies loading":
        sys.exit(3)
    if mode == "fails loading":
        fail(socket, f"no such model: {start.config['model']}")
    socket.send(messages.encode(messages.Progress("loading weights", 0.5, time.time())))
    if mode == "loads forever":
        time.sleep(60)
    ready = messages.Ready(MAX_MODEL_LEN, 10, 16, 64, VOCAB_SIZE, [1], "cpu", "float32")
    socket.send(messages.encode(ready))
    serve(socket)


def serve(socket: zmq.Socket) -> None:
    running: dict[str, messages.AddRequest] = {}
    given: dict[str, int] = {}
    num_aborts = 0
    while True:
        while socket.poll(0 if running else 60_000):
            message = messages.decode_to_engine(socket.recv())
            if isinstance(message, messages.Shutdown):
                sys.exit(0)
            if isinstance(message, messages.Abort):
                num_aborts += len(message.request_ids)
                for request_id in message.request_ids:
                    running.pop(request_id, None)
                break
            if isinstance(message, messages.Inspect):
                socket.send(messages.encode(messages.Inspection(bytes([len(running)]), 1, {})))
            if isinstance(message, messages.AddRequest):
                running[message.request_id] = message
                given[message.request_id] = len(message.output_token_ids)
        time.sleep(0.005)
        outputs = [step(socket, request, given) for request in running.values()]
        for output in outputs:
            if output.finish_reason:
                del running[output.request_id]
        stats = messages.EngineStats(num_running=len(running), num_preemptions=num_aborts)
        socket.send(messages.encode(messages.StepOutput(outputs, stats)))


def step(socket: zmq.Socket, request: messages.AddRequest, given: dict[str, int]) -> messages.TokenOutput:
    prompt, n = request.prompt_token_ids, given[request.request_id]
    if n == 2 and prompt[0] == DIES:
        os._exit(7)
    if n == 2 and prompt[0] == KILLS_ITSELF:
        os.kill(os.getpid(), 9)
    if n == 2 and prompt[0] == HANGS:
        time.sleep(60)
    if n == 2 and prompt[0] == FAILS:
        fail(socket, "CUDA error: out of cheese")
    given[request.request_id] = n + 1
    assert request.params.max_tokens is not None
    reason = "stop" if n == 3 and prompt[0] == STOPS else "length" if n + 1 >= request.params.max_tokens else None
    return messages.TokenOutput(
        request_id=request.request_id,
        token_ids=[1 if reason == "stop" else prompt[n % len(prompt)]],
        finish_reason=reason,
        num_cached_tokens=0 if n else 5,
        scheduled_time=0.0 if n else time.monotonic(),
    )


def fail(socket: zmq.Socket, why: str) -> None:
    socket.send(messages.encode(messages.Failed(why)))
    socket.close(linger=1000)
    sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[2], sys.argv[1], is_standby="standby" in sys.argv[3:])
