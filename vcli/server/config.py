"""Every knob of the HTTP side, once; the engine's own stand in engine/config.py."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from engine.config import HIDDEN


@dataclass(frozen=True)
class ServerConfig:
    """How the engine is offered to clients. Read by vcli/serve.py and vcli/server/."""

    host: Annotated[str, "address to listen on; 0.0.0.0 for every network"] = "127.0.0.1"
    port: Annotated[int, "port to listen on; 0 takes a free one"] = 8000
    served_model_name: Annotated[str, "name by which clients ask for the model, instead of MODEL"] = ""
    api_key: Annotated[str, "clients must send this key as a bearer token; better given as VCLI_API_KEY"] = field(
        default="", repr=False
    )
    api_key_file: Annotated[
        Path | None, "file (TOML) with the keys of several tenants: [name] keys = [...]; see the README"
    ] = None
    admin_address: Annotated[
        str, "where to serve the admin's routes, as PORT of 127.0.0.1 or HOST:PORT; not served unless given"
    ] = ""
    ssl_certfile: Annotated[Path | None, "PEM file with the server's certificate chain: it then talks HTTPS"] = None
    ssl_keyfile: Annotated[Path | None, "PEM file with its private key, if --ssl-certfile does not hold it, too"] = None
    allowed_origins: Annotated[
        tuple[str, ...], "origins whose web pages may use the server (CORS), or *; may be repeated; none unless given"
    ] = ()
    chat_template: Annotated[Path | None, "file with a chat template to use instead of the model's"] = None
    tool_call_parser: Annotated[
        Literal["auto", "hermes", "llama3_json", "mistral", "mistral_list", "deepseek_v3", "deepseek_v31"],
        "how the model writes tool calls; auto: as its chat template does",
    ] = "auto"
    max_queue: Annotated[int, "requests that may wait beyond those that run; more are told to come back later"] = 1024
    max_queue_tokens: Annotated[int, "tokens that the prompts of requests which wait may have together"] = field(
        default=1_000_000, metadata=HIDDEN
    )
    max_restarts: Annotated[
        int, "how often an engine that dies is started again within a minute, its streams kept; then the server ends"
    ] = 3
    step_timeout_s: Annotated[
        float, "an engine that has requests and makes no step for so long is taken for dead, and started again"
    ] = field(default=60.0, metadata=HIDDEN)
    shutdown_timeout_s: Annotated[float, "after SIGTERM, how long open requests may take to finish"] = 30.0
    explain_startup: Annotated[bool, "when ready, print how long each part of the start took"] = False
    otlp_endpoint: Annotated[
        str, "OpenTelemetry collector that gets a trace of each request, such as http://localhost:4318"
    ] = ""
    log_format: Annotated[
        Literal["text", "json"], "lines of the log; json: one object for each, of the server's and the engine's process"
    ] = "text"
    log_requests: Annotated[
        Literal["off", "lines", "text"], "log a line of JSON for each request; text: with its prompts and answers"
    ] = "off"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, got {self.port}")
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError("ssl_keyfile needs --ssl-certfile beside it")
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(f"allowed_origins must be * or origins such as https://chat.example, got {origin!r}")
        if (endpoint := self.otlp_endpoint) and not re.fullmatch(r"https?://[^/\s]+\S*", endpoint):
            raise ValueError(f"otlp_endpoint must be an address such as http://localhost:4318, got {endpoint!r}")
        if self.max_queue < 0:
            raise ValueError(f"max_queue must not be negative, got {self.max_queue}")
        if self.max_queue_tokens < 0:
            raise ValueError(f"max_queue_tokens must not be negative, got {self.max_queue_tokens}")
        if not self.step_timeout_s > 0:
            raise ValueError(f"step_timeout must be more than 0, got {self.step_timeout_s:g}")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts must not be negative, got {self.max_restarts}")
