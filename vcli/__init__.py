"""vcli: serve and benchmark open-weight language models. `from vcli import LLM, SamplingParams` is the offline API.

Nothing is imported until it is asked for, so that commands start at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.llm import LLM
    from engine.sampling_params import SamplingParams

    __version__: str

__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    match name:
        case "LLM":
            from engine.llm import LLM

            return LLM
        case "SamplingParams":
            from engine.sampling_params import SamplingParams

            return SamplingParams
        case "__version__":
            from vcli.version import version

            return version()
    raise AttributeError(f"module 'vcli' has no attribute {name!r}")
