"""Who asks: API keys, and the tenants that they belong to.

A file (TOML) names the tenants, each with its keys:

    [acme]
    keys = ["sk-old", "sk-new"]    # all of them work: an old key and its successor, or one for each service

    [operators]
    keys = ["sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"]    # the digest of the key
    is_admin = true

What always holds: a key in the clear is kept nowhere. Keys are looked up by their sha256 digests, so that the time
this takes says nothing about them.
"""

import hashlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.errors import UserError

MIN_KEY_LENGTH = 8  # characters: shorter ones are guessed


@dataclass
class Tenant:
    """Who sends requests, and what is kept about them."""

    name: str
    is_admin: bool = False  # may use the admin listener


ANYONE = Tenant("")  # who asks a server without keys, or by its --api-key


class Keys:
    """The keys that a server knows. Empty: nobody needs one."""

    def __init__(self, tenants: dict[bytes, Tenant]) -> None:
        self._tenants = tenants  # by the digests of their keys

    @classmethod
    def load(cls, api_key: str, file: Path | None) -> "Keys":
        """The key of --api-key and those of a file. Raises UserError."""
        tenants = _read(file) if file else {}
        if api_key:
            tenants.setdefault(_digest(api_key.encode()), ANYONE)
        return cls(tenants)

    def __bool__(self) -> bool:
        return bool(self._tenants)

    @property
    def has_admin(self) -> bool:
        return any(tenant.is_admin for tenant in self._tenants.values())

    def tenant_of(self, authorization: bytes) -> Tenant | None:
        """Whose key an Authorization header brings; None when it brings no known one."""
        if not self._tenants:
            return ANYONE
        scheme, _, key = authorization.partition(b" ")
        return self._tenants.get(_digest(key.strip())) if scheme.lower() == b"bearer" else None


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A tenant as the file has it."""

    keys: list[str]
    is_admin: bool = False


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
        tenant = Tenant(name, entry.is_admin)
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
