"""What the API process and the engine process say to each other, and the framing (msgpack, one struct a frame).

Each struct carries its type as a tag, so a frame decodes into the right one or is refused; nothing here can run code.
"""

from typing import Any

import msgspec

from engine.sampling_params import Pooling, SamplingParams


class Message(msgspec.Struct, array_like=True, tag=True):
    """One frame on the socket."""


class Start(Message):
    """To the engine, first: the fields of its EngineConfig."""

    config: dict[str, Any]


class AddRequest(Message):
    """To the engine: run this sequence. n > 1 arrives as n of these."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams  # max_tokens and seed are set here, whatever the client left open
    priority: int = 0  # smaller goes first
    cache_salt: str = ""  # prefix blocks are shared only between requests of the same salt
    leader_id: str = ""  # the first of the n sequences of one prompt: they share its blocks in any case
    arrival_time: float = 0.0  # time.monotonic()
    output_token_ids: list[int] = []  # what it has given already, to an engine that is gone: it goes on behind them


class Abort(Message):
    """To the engine: forget these requests, wherever they are."""

    request_ids: list[str]


class Inspect(Message):
    """To the engine: say how its blocks and its memory are, between two steps."""


class Shutdown(Message):
    """To the engine: stop now."""


class Progress(Message):
    """From the engine while it starts: what it is doing and how much of that is done."""

    stage: str
    fraction: float  # 0 to 1
    time: float  # time.time() of saying so


class Ready(Message):
    """From the engine, once: the model is loaded and the cache is sized."""

    max_model_len: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    vocab_size: int
    eos_token_ids: list[int]
    device: str
    dtype: str
    default_sampling: dict[str, float] = {}  # parameters of a request that leaves them open
    max_prefill_chunk: int = 0
    kv_cache_bytes: int = 0
    hidden_size: int = 0  # of an embedding
    default_pooling: Pooling = "last"


class TokenLogprob(msgspec.Struct, array_like=True):
    """Log probability of one token and, best first, of the alternatives asked for."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token
    top: list[tuple[int, float]]


class TokenOutput(msgspec.Struct, array_like=True):
    """New tokens of one request."""

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop", "length", "abort" or, where logits are NaN or infinite, "error"
    stop_reason: int | None = None  # the stop token's id when a stop_token_id, not the model's eos, ended it
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None  # with the first token; the first entry is None
    num_cached_tokens: int = 0
    scheduled_time: float = 0.0  # time.monotonic() when it first entered a batch
    embedding: bytes | None = None  # the hidden states of a request that pools them: float32, little-endian
    ends_in_text: bool = False  # beside "stop": the last token is part of the text, and the last of its grammar
    error: str = ""  # beside "error": what the request's grammar or other rules for its tokens failed at


class EngineStats(msgspec.Struct, array_like=True):
    """The state of the engine after a step; counters count from its start, or from that of the first of several."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_used: int = 0
    num_blocks: int = 0
    num_slots_allocated: int = 0  # token slots in the blocks that requests own
    num_slots_used: int = 0  # of those, the ones that hold a token
    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0  # of the requests that have given a token
    generation_tokens: int = 0
    prefix_cache_queries: int = 0  # tokens looked up
    prefix_cache_hits: int = 0  # tokens found
    batch_tokens: int = 0  # of the last step
    stage_seconds: dict[str, float] = {}  # by stage of step_clock.py, since the engine's start
    time: float = 0.0  # time.monotonic() up to which they are counted
    num_host_blocks: int = 0  # in memory of the host
    num_host_blocks_used: int = 0  # that hold something
    num_blocks_paged_out: int = 0  # copied to the host
    num_blocks_paged_in: int = 0  # copied back

    def counts(self) -> "EngineStats":
        """The counters alone: what is left of an engine that is gone."""
        return EngineStats(stage_seconds=self.stage_seconds, **{name: getattr(self, name) for name in COUNTERS})

    def count_on(self, before: "EngineStats") -> None:
        """Go on counting where the engines before this one ended."""
        for name in COUNTERS:
            setattr(self, name, getattr(self, name) + getattr(before, name))
        seconds = self.stage_seconds
        self.stage_seconds = before.stage_seconds | {
            stage: spent + before.stage_seconds.get(stage, 0.0) for stage, spent in seconds.items()
        }


COUNTERS = (
    "num_steps",
    "num_preemptions",
    "prompt_tokens",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_blocks_paged_out",
    "num_blocks_paged_in",
)


class StepOutput(Message):
    """From the engine after each step, and after a change that no step follows."""

    outputs: list[TokenOutput]
    stats: EngineStats


class Inspection(Message):
    """From the engine, when it is asked: what is too much to be said after each step."""

    blocks: bytes  # one for each block that was looked at: its state, a number of block_pool.BLOCK_STATES
    block_stride: int  # every so manieth block of the pool was looked at
    memory: dict[str, int]  # bytes of the device by kind, see memory.py
    fragmentation: float | None = None  # of a GPU's memory, see memory.py


class Failed(Message):
    """From the engine, last: why it cannot go on."""

    error: str


ToEngine = Start | AddRequest | Abort | Inspect | Shutdown
FromEngine = Progress | Ready | StepOutput | Inspection | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
