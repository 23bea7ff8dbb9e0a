"""The next engine's process, which starts while the engine at hand serves: a restart need not wait for its imports."""

from engine.link import EngineLink


class Standby:
    """Owns at most one process that is to become the next engine."""

    def __init__(self) -> None:
        self.link: EngineLink | None = None

    def start(self, command: list[str]) -> None:
        """Have a process stand by, unless one does."""
        if self.link is not None and self.link.process.poll() is not None:
            self.close()
        if self.link is None:
            self.link = EngineLink(command, is_standby=True)

    def take(self, command: list[str]) -> EngineLink:
        """A link to the next engine's process: the one that stands by, unless it is still importing."""
        if self.link is None or not self.link.is_warm:  # one that imports at its leisure would be late
            return EngineLink(command)
        link, self.link = self.link, None
        return link

    def close(self) -> None:
        """End the process, if there is one, and wait for it."""
        if self.link is not None:
            self.link.close(0.0)
            self.link = None
