"""Chat templates are rendered in a process of their own, which is ended when one takes too long.

What always holds: whatever a template does, the event loop goes on, and the next conversation gets a process that
works. (What a template can do in there: template_process.py.)
"""

import asyncio
import subprocess
from typing import Any

import msgspec

from engine.child import module_command, module_environment
from vcli.server.template_process import LENGTH_BYTES

TIMEOUT_S = 10.0  # a usual template takes less than a millisecond
MAX_REPLY_BYTES = 128 * 2**20
READ_BYTES = 2**20  # at once: a long prompt comes in few pieces
# What it gets of the environment: keys and tokens stay here.
VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "VCLI_LOG_FORMAT")


class Templates:
    """Owns the process, which is started for the first conversation."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def render(self, template: str, **variables: Any) -> str:
        """`engine.chat_template.render_chat` elsewhere. Raises ValueError."""
        try:
            request = msgspec.json.encode((template, variables))  # unlike msgpack it has room for every whole number
        except RecursionError:
            raise ValueError("messages and template arguments are nested too deeply") from None
        async with self._turn:
            if self._process is not None and self._process.returncode is not None:
                await self._end()  # somebody ended it
            process = self._process = self._process or await _start()
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    is_text, text = await _exchange(process, request)
            except BaseException as error:  # a cancelled one, too: its reply is not to be taken for the next one's
                await self._end()
                if isinstance(error, TimeoutError):
                    raise ValueError(f"the chat template did not end within {TIMEOUT_S:g} s") from None
                if isinstance(error, OSError | EOFError | RuntimeError):  # the last one is uvloop's
                    raise ValueError("the chat template ended the process that it ran in") from None
                raise
        if not is_text:
            raise ValueError(text)
        return text

    async def close(self) -> None:
        async with self._turn:
            await self._end()

    async def _end(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            if process.returncode is None:
                process.kill()
            await process.wait()


async def _start() -> asyncio.subprocess.Process:
    command, pipe = module_command("vcli.server.template_process"), subprocess.PIPE
    environment = {name: value for name, value in module_environment().items() if name in VARIABLES}
    return await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, limit=READ_BYTES, env=environment, start_new_session=True
    )


async def _exchange(process: asyncio.subprocess.Process, request: bytes) -> tuple[bool, str]:
    """Send a request and wait for its reply. Raises EOFError or OSError when the process is gone."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(len(request).to_bytes(LENGTH_BYTES, "big") + request)
    await process.stdin.drain()
    length = int.from_bytes(await process.stdout.readexactly(LENGTH_BYTES), "big")
    if length > MAX_REPLY_BYTES:
        raise ValueError(f"the chat template made a prompt of {length >> 20:,} MiB: at most {MAX_REPLY_BYTES >> 20}")
    return msgspec.json.decode(await process.stdout.readexactly(length), type=tuple[bool, str])
