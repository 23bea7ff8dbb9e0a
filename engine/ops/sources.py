"""Where the sources of the kernels lie: inside the package when installed, beside it in a checkout."""

from pathlib import Path


def kernels_folder() -> Path:
    engine = Path(__file__).parents[1]
    return next(folder for folder in (engine / "kernels", engine.parent / "kernels") if folder.is_dir())
