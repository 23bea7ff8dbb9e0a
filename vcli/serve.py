"""`vcli serve`: from flags to a listening server. What can be wrong with them is said before anything is started."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.errors import UserError
from vcli.flags import FlagError, with_flags
from vcli.server.config import ServerConfig

if TYPE_CHECKING:
    import socket

    from vcli.server.keys import Keys
    from vcli.server.tracing import Traces

LOOPBACK = "127.0.0.1"
BACKLOG = 2048  # connections that the system holds for us: many clients may come at the same moment


@with_flags
def serve(engine: EngineConfig, server: ServerConfig) -> None:
    """Serve a model over an OpenAI-compatible HTTP API."""
    import logging

    from engine import log

    os.environ["VCLI_LOG_FORMAT"] = server.log_format
    log.set_up("api", server.log_format)
    try:
        _serve(engine, server)
    except UserError as error:
        if server.log_format == "text":
            raise
        logging.getLogger("vcli").critical("%s", error)
        sys.exit(1)


def _serve(engine: EngineConfig, server: ServerConfig) -> None:
    """Check what there is, start the engine and, beside it, the rest."""
    from engine.cache import keep_bytecode
    from engine.hub import resolve_model
    from engine.link import EngineLink
    from engine.timeline import Timeline, process_start_time
    from vcli.server.keys import Keys
    from vcli.server.tls import Certificate

    timeline = Timeline()
    timeline.begin("api", "starting Python", process_start_time())
    keep_bytecode()
    is_local = not engine.model or os.path.exists(os.path.expanduser(engine.model))
    # A model on the hub may take minutes to come: it is fetched while HTTP answers already.
    root = str(resolve_model(engine.model)) if is_local else engine.model
    chat_template, keys = _read_template(server), Keys.load(server.api_key, server.api_key_file)
    certificate = Certificate(server.ssl_certfile, server.ssl_keyfile) if server.ssl_certfile else None
    traces = _traces(server.otlp_endpoint) if server.otlp_endpoint else None
    listener = listen(server.host, server.port)
    admin_listener = listen_for_admin(server.admin_address, keys) if server.admin_address else None
    timeline.begin("api", "starting the engine process")
    link = EngineLink()
    timeline.begin("api", "importing the server")
    from vcli.server.lifetime import Plan, run  # after the engine's start: it takes a while, and needs no waiting for

    plan = Plan(
        engine=replace(engine, model=root),
        server=server,
        model_name=server.served_model_name or engine.model or Path(root).stem,
        model_root=root,
        chat_template=chat_template,
        keys=keys,
        certificate=certificate,
        traces=traces,
        listener=listener,
        admin_listener=admin_listener,
        link=link,
        timeline=timeline,
    )
    sys.exit(run(plan))


def listen_for_admin(address: str, keys: "Keys") -> "socket.socket":
    """The admin's listening socket. Raises UserError, also for one that strangers could use."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]") or LOOPBACK
    if not port.isdecimal() or int(port) > 65535:
        raise FlagError(f"--admin-address must be PORT or HOST:PORT, got {address!r}")
    if not keys.has_admin and not _is_loopback(host):
        raise UserError(
            f"--admin-address {address} can be reached by others, and no key is an admin's: "
            f"give a tenant is_admin = true in --api-key-file, or listen on {LOOPBACK}"
        )
    return listen(host, int(port), flags=("--admin-address", "--admin-address"))


def listen(host: str, port: int, flags: tuple[str, str] = ("--host", "--port")) -> "socket.socket":
    """A listening socket. Raises UserError when the address cannot be had, naming the flags of its two parts."""
    import errno
    import socket

    host_flag, port_flag = flags
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except socket.gaierror as error:
        raise UserError(f"{host_flag} {host} is no address that can be resolved ({error.strerror})") from None
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: f"port {port} is taken: choose another with {port_flag}",
            errno.EACCES: f"port {port} needs more rights than you have: choose one above 1023 with {port_flag}",
            errno.EADDRNOTAVAIL: f"{host_flag} {host} is no address of this machine: {LOOPBACK} or 0.0.0.0 will do",
        }
        reason = reasons.get(error.errno or 0, f"cannot listen on {host}:{port}: {error.strerror}")
        raise UserError(reason) from None


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _traces(endpoint: str) -> "Traces":
    from vcli.server.tracing import Traces

    return Traces(endpoint)


def _read_template(server: ServerConfig) -> str | None:
    if server.chat_template is None:
        return None
    try:
        return server.chat_template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {server.chat_template} cannot be read: {error}") from None
