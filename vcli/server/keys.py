"""Who asks: API keys, and the tenants that they belong to.

A file (TOML) names the tenants, each with its keys and, where wanted, its limits:

    [acme]
    keys = ["sk-old", "sk-new"]    # all of them work: an old key and its successor, or one for each service
    requests_per_minute = 600
    tokens_per_minute = 200_000    # of prompts and answers
    max_open_requests = 64
    min_priority = -1              # the most urgent that its requests may be; 0 unless given

    [operators]
    keys = ["sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"]    # the digest of the key
    is_admin = true

What always holds: a key in the clear is kept nowhere. Keys are looked up by their sha256 digests, so that the time
this takes says nothing about them. And what one tenant sends is never told to another, not even by the time that an
answer takes: prefix blocks are shared within a tenant alone.
"""

import hashlib
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec

from engine.errors import UserError
from vcli.server.limits import Budget, Limits
from vcli.server.protocol import ApiError

MIN_KEY_LENGTH = 8  # characters: shorter ones are guessed


@dataclass
class Tenant:
    """Who sends requests, and what is kept about them."""

    name: str
    is_admin: bool = False  # may use the admin listener
    min_priority: int | None = None  # lower numbers go first; None: any
    budget: Budget = field(default_factory=lambda: Budget(Limits()))

    def check_priority(self, priority: int) -> None:
        """Raises ApiError for a request that would push itself before those of others."""
        if self.min_priority is not None and priority < self.min_priority:
            message = f"priority = {priority}: this key may ask for {self.min_priority} or more (lower goes first)"
            raise ApiError(403, message, param="priority")

    def salt(self, cache_salt: str) -> str:
        """The salt of a request's prefix blocks: its own, apart from those of all other tenants."""
        return f"{self.name}\n{cache_salt}" if self.name else cache_salt


ANYONE = Tenant("")  # who asks a server without a file of keys


class Keys:
    """The keys that a server knows. Empty: nobody needs one."""

    def __init__(self, tenants: dict[bytes, Tenant], file: Path | None = None) -> None:
        self._tenants = tenants  # by the digests of their keys
        self._file = file

    @classmethod
    def load(cls, api_key: str, file: Path | None) -> "Keys":
        """The key of --api-key, or those of a file. Raises UserError."""
        if file is None:
            return cls({_digest(api_key.encode()): ANYONE} if api_key else {})
        if api_key:
            raise UserError("--api-key and --api-key-file exclude each other: put the key into the file")
        return cls(_read(file), file)

    def reload(self) -> None:
        """Read the file again. A tenant with the limits that it had goes on with what it has left of them.

        Raises UserError, and all stays as it was.
        """
        if self._file is None:
            return
        tenants = _read(self._file)
        if self.has_admin and not any(tenant.is_admin for tenant in tenants.values()):
            raise UserError(f"--api-key-file {self._file} has no admin any more: nobody could change that again")
        known = {tenant.name: tenant for tenant in self._tenants.values()}
        for tenant in tenants.values():
            if (before := known.get(tenant.name)) and before.budget.limits == tenant.budget.limits:
                tenant.budget = before.budget
        self._tenants = tenants

    def __bool__(self) -> bool:
        return bool(self._tenants)

    @property
    def has_admin(self) -> bool:
        return any(tenant.is_admin for tenant in self._tenants.values())

    def tenant_of(self, authorization: bytes, x_api_key: bytes = b"") -> Tenant | None:
        """Whose key an Authorization header brings, or else an x-api-key one; None when neither brings a known one."""
        if not self._tenants:
            return ANYONE
        scheme, _, key = authorization.partition(b" ")
        bearer = self._tenants.get(_digest(key.strip())) if scheme.lower() == b"bearer" else None
        return bearer or self._tenants.get(_digest(x_api_key.strip()))


_Count = Annotated[int, msgspec.Meta(ge=1)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A tenant as the file has it."""

    keys: list[str]
    is_admin: bool = False
    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    max_open_requests: _Count | None = None
    min_priority: int = 0


def _read(file: Path) -> dict[bytes, Tenant]:
    try:
        entries = msgspec.convert(tomllib.loads(file.read_text(encoding="utf-8")), dict[str, _Entry])
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {file} cannot be read: {error}") from None
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        hint = 'it has tables such as [name] with keys = ["..."]'
        raise UserError(f"--api-key-file {file} is not understood ({error}): {hint}") from None
    tenants: dict[bytes, Tenant] = {}
    for name, entry in entries.items():
        if not re.fullmatch(r"[\w.@-]{1,64}", name):
            raise UserError(f"--api-key-file {file}: {name!r} is no name for a tenant: use up to 64 letters and digits")
        limits = Limits(entry.requests_per_minute, entry.tokens_per_minute, entry.max_open_requests)
        tenant = Tenant(name, entry.is_admin, entry.min_priority, Budget(limits))
        for key in entry.keys:
            digest = _digest_in(key, f"--api-key-file {file}, [{name}]")
            if tenants.setdefault(digest, tenant) is not tenant:
                raise UserError(f"--api-key-file {file}: [{tenants[digest].name}] and [{name}] have the same key")
    if not tenants:
        raise UserError(f"--api-key-file {file} holds no key: nobody could use the server")
    return tenants


def _digest_in(key: str, where: str) -> bytes:
    if match := re.fullmatch(r"sha256:([0-9a-fA-F]{64})", key):
        return bytes.fromhex(match[1])
    if key.startswith("sha256:"):
        raise UserError(f"{where}: a digest has 64 hexadecimal digits after sha256:, one has {len(key) - 7} characters")
    if len(key) < MIN_KEY_LENGTH:
        raise UserError(f"{where}: a key of {len(key)} characters can be guessed: use {MIN_KEY_LENGTH} or more")
    return _digest(key.encode())


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
