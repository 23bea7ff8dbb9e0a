"""The server's certificate: read at the start, and again when it was renewed."""

import ssl
from pathlib import Path

from engine.errors import UserError


class Certificate:
    """The server's certificate and its key, as PEM files. Raises UserError when they cannot be used."""

    def __init__(self, certfile: Path, keyfile: Path | None) -> None:
        self._files = certfile, keyfile
        self.context = self._load(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH))

    def reload(self) -> None:
        """Read the files again, for the connections to come. Raises UserError, and all stays as it was."""
        self._load(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH))  # tried on a context that nobody uses
        self._load(self.context)

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        certfile, keyfile = self._files
        try:
            context.load_cert_chain(certfile, keyfile, password=_no_password)
        except OSError as error:  # ssl.SSLError is one, too
            files = f"--ssl-certfile {certfile}" + (f", --ssl-keyfile {keyfile}" if keyfile else "")
            raise UserError(f"{files}: no certificate with its key can be read from there ({error})") from None
        return context


def _no_password() -> str:
    raise ssl.SSLError("the key is encrypted, and nobody is there to ask for its password")
