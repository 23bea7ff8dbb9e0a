"""Files that a result is written to: their names say the format."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from engine.errors import UserError

Content = Callable[[], str | bytes]


def check(path: Path, endings: Iterable[str]) -> None:
    """Raise UserError before a long run rather than after it."""
    if not _ending(path, endings):
        raise UserError(f"--output {path}: the extension must be one of {', '.join(endings)}")
    if path.suffix == ".png":
        from bench.charts import check_png

        check_png()


def write(path: Path, formats: Mapping[str, Content]) -> None:
    """Write the content of the format that the file's name ends in. Raises UserError."""
    check(path, formats)
    content = formats[_ending(path, formats)]()
    make_folder("--output", path)
    try:
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from None


def make_folder(flag: str, path: Path) -> None:
    """That a file at `path` lies in. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror})") from None


def _ending(path: Path, endings: Iterable[str]) -> str:
    """The longest one that fits: .requests.csv is not .csv."""
    return max((ending for ending in endings if path.name.endswith(ending)), key=len, default="")
