"""What all endpoints share: the engine, its door, its counters, and the checks that requests of every kind pass."""

from dataclasses import dataclass, field

from engine.async_engine import AsyncEngine
from engine.grammar import GrammarError
from engine.messages import Ready
from engine.tokenizer import Tokenizer
from vcli.server import chat, replay, structured
from vcli.server.admission import RETRY_LATER_S, Admission
from vcli.server.bodies import Bodies
from vcli.server.config import ServerConfig
from vcli.server.dashboard.feed import Feed
from vcli.server.dialects import Dialect, dialect_of
from vcli.server.keys import Keys
from vcli.server.metrics import Metrics
from vcli.server.protocol import ApiError, ChatRequest, TokenizeRequest
from vcli.server.responses.store import ResponseStore
from vcli.server.templates import Templates
from vcli.server.tls import Certificate
from vcli.server.tracing import Traces


@dataclass
class Service:
    """What every endpoint needs, made once when the server starts."""

    config: ServerConfig
    keys: Keys
    certificate: Certificate | None
    traces: Traces | None
    engine: AsyncEngine
    model_name: str
    model_root: str  # the folder, file or name that the model was loaded from
    chat_template: str | None  # the operator's own; None: the model's
    templates: Templates
    admission: Admission
    metrics: Metrics
    feed: Feed
    replays: replay.Replays = field(default_factory=replay.Replays)
    responses: ResponseStore = field(default_factory=ResponseStore)
    bodies: Bodies = field(default_factory=Bodies)

    def require_ready(self) -> Ready:
        """Raises ApiError while the model loads and after the engine's death."""
        if self.engine.error is not None:
            raise ApiError(500, f"the engine is dead: {self.engine.error}", code="engine_dead")
        if self.engine.ready is None:
            stage, fraction = self.engine.progress
            message = f"the model is still loading ({stage}, {fraction:.0%}; see /ready)"
            raise self.admission.reject("loading", 503, message, RETRY_LATER_S)
        return self.engine.ready

    def require_tokenizer(self) -> Tokenizer:
        """Raises ApiError when this server handles token ids only."""
        if self.engine.tokenizer is None:
            raise ApiError(400, "this server was started with --skip-tokenizer-init: send token ids to /v1/completions")
        return self.engine.tokenizer

    @property
    def dialect(self) -> Dialect:
        """How the model writes, as its chat template tells."""
        tokenizer = self.require_tokenizer()
        return dialect_of(self.chat_template or tokenizer.chat_template or "", self.config.tool_call_parser)

    def check_model(self, name: str | None) -> None:
        if name and name not in (self.model_name, self.model_root):
            message = f"the model {name[:100]!r} does not exist here: this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_priority(self, priority: int | None) -> None:
        if priority and self.engine.config.scheduling_policy == "fcfs":
            raise ApiError(
                400,
                f"priority = {priority}: this server serves by arrival (--scheduling-policy fcfs)",
                param="priority",
            )

    async def check_grammar(self, grammar: str, param: str) -> None:
        """Raises ApiError for a grammar that is none, of the parameter that it was made of."""
        try:
            if grammar:
                await self.engine.check_grammar(grammar)
        except GrammarError as error:
            raise structured.bad_grammar(error, param or None) from None

    async def render(self, request: ChatRequest | TokenizeRequest) -> str:
        """A conversation as text, by the model's template. Raises ApiError."""
        tokenizer = self.require_tokenizer()
        continues = bool(request.continue_final_message)
        return await chat.render(
            self.templates,
            request.messages or [],
            tokenizer,
            self.chat_template or tokenizer.chat_template,
            self.dialect,
            tools=[] if isinstance(request, ChatRequest) and request.tool_choice == "none" else request.tools or [],
            max_model_len=self.require_ready().max_model_len,
            add_generation_prompt=not continues
            if request.add_generation_prompt is None
            else request.add_generation_prompt,
            continue_final_message=continues,
            template_kwargs=chat.template_kwargs(request),
        )
