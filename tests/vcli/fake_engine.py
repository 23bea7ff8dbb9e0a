"""An engine process without a model: it answers by repeating the prompt's tokens, over the real messages.

FAKE_STEP_S, FAKE_SEQUENCE_S (more for each sequence of a step) and FAKE_LOAD_S set its pace; a request with cache_salt
"die" ends the process, "mutter" does so as C++ does, "fail" makes it report why.
"""

import os
import struct
import sys
import time

import zmq

from engine import messages

EOS = 2
HIDDEN_SIZE = 8
SOCKET_POLL_MS = 50


def main(address: str) -> None:
    socket = zmq.Context().socket(zmq.PAIR)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(address)
    parent = os.getppid()
    config = messages.decode_to_engine(socket.recv()).config
    for percent in range(0, 100, 10):
        socket.send(messages.encode(messages.Progress("loading weights", percent / 100, time.time())))
        time.sleep(float(os.environ.get("FAKE_LOAD_S", "0")) / 10)
    ready = messages.Ready(
        max_model_len=config["max_model_len"] or 512,
        num_blocks=1024,
        block_size=16,
        max_num_seqs=config["max_num_seqs"],
        vocab_size=512,
        eos_token_ids=[EOS],
        device="cpu",
        dtype="float32",
        hidden_size=HIDDEN_SIZE,
    )
    socket.send(messages.encode(ready))
    requests: dict[str, messages.AddRequest] = {}
    done: dict[str, int] = {}
    num_given = 0  # tokens
    while os.getppid() == parent:
        while socket.poll(0 if requests else SOCKET_POLL_MS):
            message = messages.decode_to_engine(socket.recv())
            if isinstance(message, messages.Shutdown):
                return
            if isinstance(message, messages.Inspect):
                memory = {"weights": 6 << 30, "kv_cache": 1 << 30, "other": 1 << 29, "free": 1 << 29}
                socket.send(messages.encode(messages.Inspection(bytes(range(4)) * 256, 1, memory, 0.25)))
            elif isinstance(message, messages.Abort):
                for request_id in message.request_ids:
                    requests.pop(request_id, None)
            else:
                if message.cache_salt == "mutter":
                    os.write(2, b"terminate called\nafter \xff throwing")
                    os._exit(7)
                if message.cache_salt == "die":
                    os._exit(7)
                if message.cache_salt == "fail":
                    socket.send(messages.encode(messages.Failed("out of luck: buy more")))
                    socket.close(linger=1000)
                    sys.exit(1)
                requests[message.request_id] = message
                done[message.request_id] = len(message.output_token_ids)
        if requests:
            running = list(requests.values())[: config["max_num_seqs"]]
            each_s = float(os.environ.get("FAKE_SEQUENCE_S", "0"))
            time.sleep(float(os.environ.get("FAKE_STEP_S", "0.001")) + each_s * len(running))
            outputs = [next_output(request, done) for request in running]
            for output in outputs:
                if output.finish_reason:
                    requests.pop(output.request_id)
            num_given += len(outputs)
            num_running = min(len(requests), config["max_num_seqs"])
            num_waiting = len(requests) - num_running
            stats = messages.EngineStats(num_running, num_waiting, num_blocks=1024, num_slots_allocated=16)
            stats.generation_tokens = num_given
        else:
            outputs, stats = [], messages.EngineStats(num_blocks=1024, generation_tokens=num_given)
        socket.send(messages.encode(messages.StepOutput(outputs, stats)))


def next_output(request: messages.AddRequest, done: dict[str, int]) -> messages.TokenOutput:
    """The next token of a request: the prompt over and over; or a vector, of the prompt's tokens over and over."""
    if request.params.pooling is not None:
        numbers = [float(request.prompt_token_ids[i % len(request.prompt_token_ids)]) for i in range(HIDDEN_SIZE)]
        vector = struct.pack(f"<{HIDDEN_SIZE}f", *numbers)
        return messages.TokenOutput(request.request_id, [], "stop", num_cached_tokens=1, embedding=vector)
    prompt, params, position = request.prompt_token_ids, request.params, done[request.request_id]
    token_id = prompt[position % len(prompt)]
    done[request.request_id] += 1
    is_eos = token_id == EOS and not params.ignore_eos
    is_stop = is_eos or token_id in params.stop_token_ids
    return messages.TokenOutput(
        request_id=request.request_id,
        token_ids=[token_id],
        finish_reason="stop" if is_stop else "length" if position + 1 == params.max_tokens else None,
        stop_reason=token_id if is_stop and not is_eos else None,
        logprobs=None if params.logprobs is None else [logprob(token_id, params.logprobs)],
        prompt_logprobs=None
        if params.prompt_logprobs is None or position
        else [None, *(logprob(each, params.prompt_logprobs) for each in prompt[1:])],
        num_cached_tokens=1,
        scheduled_time=time.monotonic(),
    )


def logprob(token_id: int, num_top: int) -> messages.TokenLogprob:
    return messages.TokenLogprob(token_id, -0.5, 1, [((token_id + i) % 512, -0.5 - i) for i in range(num_top)])


if __name__ == "__main__":
    main(sys.argv[1])
