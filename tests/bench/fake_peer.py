"""Servers with the command lines of other projects' and nothing behind them: `fake_peer.py ENGINE ARGUMENTS...`.

A flag that the real one does not have ends it as there. What it was told and asked is written to $FAKE_PEER_LOG. With
$FAKE_PEER_FAILS=ENGINE that one dies while it starts.
"""

import argparse
import asyncio
import json
import os
import sys
from typing import Any

from aiohttp import web

FLAGS = {
    "vllm": [
        *("--model", "--host", "--port", "--dtype", "--max-model-len", "--gpu-memory-utilization", "--max-num-seqs"),
        *("--max-num-batched-tokens", "--load-format", "--quantization", "--kv-cache-dtype"),
    ],
    "sglang": [
        *("--model-path", "--host", "--port", "--dtype", "--context-length", "--mem-fraction-static"),
        *("--max-running-requests", "--load-format", "--quantization", "--kv-cache-dtype"),
    ],
    "lmdeploy": [
        *("--server-name", "--server-port", "--dtype", "--session-len", "--cache-max-entry-count", "--max-batch-size"),
    ],
    "tensorrt-llm": [
        *("--host", "--port", "--max_seq_len", "--kv_cache_free_gpu_memory_fraction", "--max_batch_size"),
        "--max_num_tokens",
    ],
    "transformers": ["--host", "--port", "--dtype", "--device", "--cb-max-memory-percent"],
}
SWITCHES = {
    "vllm": ["--enable-prefix-caching", "--no-enable-prefix-caching", "--enforce-eager", "--no-enforce-eager"],
    "sglang": ["--disable-radix-cache", "--disable-cuda-graph"],
    "lmdeploy": ["--enable-prefix-caching"],
    "tensorrt-llm": [],
    "transformers": ["--continuous-batching"],
}
WORDS = {"lmdeploy": ["serve", "api_server", "MODEL"], "tensorrt-llm": ["MODEL"], "transformers": ["serve", "MODEL"]}
REQUEST_FIELDS = {"model", "prompt", "max_tokens", "temperature", "stream", "generation_config"}  # transformers' own


class FakePeer:
    def __init__(self, engine: str, arguments: list[str]) -> None:
        self.engine = engine
        parser = argparse.ArgumentParser(prog=engine, allow_abbrev=False)
        for word in WORDS.get(engine, []):
            parser.add_argument(word)
        for flag in FLAGS[engine]:
            parser.add_argument(flag)
        for switch in SWITCHES[engine]:
            parser.add_argument(switch, action="store_true")
        told = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value not in (None, False)}
        self.port = int(told.get("port") or told.get("server_port"))
        self.model = told.get("model") or told.get("model_path") or told.get("MODEL")
        self.log(told=told)

    def log(self, **entry: Any) -> None:
        with open(os.environ["FAKE_PEER_LOG"], "a") as file:
            file.write(json.dumps({"engine": self.engine, **entry}) + "\n")

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def models(self, request: web.Request) -> web.Response:
        lists_none = self.engine == "transformers"
        return web.json_response({"data": [] if lists_none else [{"id": self.model}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        is_transformers = self.engine == "transformers"
        is_text_only = is_transformers or self.engine == "lmdeploy"
        if (is_transformers and set(body) - REQUEST_FIELDS) or (self.engine == "tensorrt-llm" and "cache_salt" in body):
            return web.json_response({"detail": f"Unexpected fields in the request: {sorted(body)}"}, status=422)
        if is_text_only and not isinstance(body["prompt"], str):
            return web.json_response({"detail": "prompt must be a string."}, status=400)
        self.log(asked=body)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        events: list[Any] = [{"choices": [{"text": " a"}]} for _ in range(body["max_tokens"])]
        usage = {"prompt_tokens": 8, "completion_tokens": body["max_tokens"]}
        for event in [*events, {"choices": [], "usage": usage}]:
            await asyncio.sleep(0.01)
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        if not is_transformers:
            await response.write(b"data: [DONE]\n\n")
        return response

    def serve(self) -> None:
        app = web.Application()
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.completions)
        web.run_app(app, host="127.0.0.1", port=self.port, print=None)


if __name__ == "__main__":
    engine, *arguments = sys.argv[1:]
    if os.environ.get("FAKE_PEER_FAILS") == engine:
        sys.exit("CUDA error: out of memory")
    FakePeer(engine, arguments).serve()
