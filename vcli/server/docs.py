"""What clients must know of each route: the words of /openapi.json (openapi.py), to which tests hold the server."""

from vcli.server import shapes
from vcli.server.anthropic import shapes as anthropic
from vcli.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from vcli.server.embeddings import EmbeddingRequest
from vcli.server.openapi import NOT_EMPTY, TEXT, Doc
from vcli.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from vcli.server.responses import shapes as responses
from vcli.server.responses.protocol import InputTokensRequest, ItemsQuery, ResponsesRequest, RetrieveQuery

TOKENIZES = (404, 429, 500, 503)  # errors beside those of every body
GENERATES = (*TOKENIZES, 422)

HELLO = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16}

MODELS = Doc("The model that is served.", gives=(shapes.ModelList, anthropic.ModelList), names={"name": "/data/0/id"})
MODEL = Doc("The model, if it has this name.", gives=(shapes.ModelEntry, anthropic.ModelEntry), errors=[404])

CHAT_COMPLETIONS = Doc(
    "The answer to a conversation.",
    takes=ChatRequest,
    limits={"messages": NOT_EMPTY},
    gives=shapes.ChatCompletion,
    event=shapes.ChatChunk,
    ends_with_done=True,
    errors=GENERATES,
    example=HELLO,
)
COMPLETIONS = Doc(
    "How texts or token ids go on.",
    takes=CompletionRequest,
    limits={"prompt": NOT_EMPTY},
    gives=shapes.Completion,
    event=shapes.CompletionChunk,
    ends_with_done=True,
    errors=GENERATES,
    example={"prompt": "The sky is", "max_tokens": 16},
)
EMBEDDINGS = Doc(
    "Texts or token ids as vectors.",
    takes=EmbeddingRequest,
    limits={"input": NOT_EMPTY},
    gives=shapes.EmbeddingList,
    errors=GENERATES,
    example={"input": ["The sky", "is"]},
)
MESSAGES = Doc(
    "The answer to a conversation, for Anthropic's clients.",
    takes=MessagesRequest,
    limits={"messages": NOT_EMPTY},
    gives=anthropic.Message,
    event=anthropic.EVENTS,
    errors=GENERATES,
    error=anthropic.ErrorReply,
    example=HELLO,
)
COUNT_TOKENS = Doc(
    "How many tokens a conversation has, for Anthropic's clients.",
    takes=CountTokensRequest,
    limits={"messages": NOT_EMPTY},
    gives=anthropic.TokenCount,
    errors=TOKENIZES,
    error=anthropic.ErrorReply,
    example=HELLO,
)
RESPONSES = Doc(
    "The answer to a conversation, item by item; it is stored, and may be made in the background.",
    takes=ResponsesRequest,
    limits={"input": NOT_EMPTY},
    gives=responses.Response,
    event=responses.EVENTS,
    names={"response_id": "/id"},
    errors=GENERATES,
    example={"input": "Hello!", "max_output_tokens": 16},
)
INPUT_TOKENS = Doc(
    "How many tokens the prompt of a response has.",
    takes=InputTokensRequest,
    limits={"input": NOT_EMPTY},
    gives=responses.TokenCount,
    errors=TOKENIZES,
    example={"input": "Hello!"},
)
RESPONSE = Doc(
    "A stored response as it is now, or its events from any number on.",
    query=RetrieveQuery,
    gives=responses.Response,
    event=responses.EVENTS,
    errors=[400, 404],
)
DELETE_RESPONSE = Doc("Forget a response; one that is being made ends.", gives=responses.Deleted, errors=[404])
CANCEL_RESPONSE = Doc("End a response that is made in the background.", gives=responses.Response, errors=[400, 404])
INPUT_ITEMS = Doc("What led to a response.", query=ItemsQuery, gives=responses.ItemPage, errors=[400, 404])

TOKENIZE = Doc(
    "A text, or a conversation by the chat template, as token ids.",
    takes=TokenizeRequest,
    gives=shapes.Tokens,
    errors=TOKENIZES,
    example={"prompt": "The sky is"},
)
DETOKENIZE = Doc(
    "Token ids as text.",
    takes=DetokenizeRequest,
    limits={"tokens": {"items": {"minimum": 0}}},
    gives=shapes.Text,
    errors=TOKENIZES,
    example={"tokens": [5, 6, 7]},
)

HEALTH = Doc("Is the server alive?", gives=shapes.Health, also={500: shapes.Health}, is_public=True)
READY = Doc("Is it ready to serve?", gives=shapes.Readiness, also={503: shapes.Readiness}, is_public=True)
VERSION = Doc("Of vcli.", gives=shapes.Version)
METRICS = Doc("For Prometheus.", gives=TEXT)
