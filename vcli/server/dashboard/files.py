"""The page itself: a few files beside this one, read once and sent as they are.

It needs nothing from elsewhere, and its policy lets it load nothing: no script, style or picture but these, and no
connection but to this server.
"""

from pathlib import Path

from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

_FOLDER = Path(__file__).with_name("page")
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",  # another version of the server has another page
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_FILES = {"/" if file.suffix == ".html" else f"/dashboard/{file.name}": file for file in sorted(_FOLDER.iterdir())}
PATHS = tuple(_FILES)
FEED_PATH = "/dashboard/events"


def dashboard_routes(feed: ASGIApp) -> list[Route]:
    """The feed, and a route for each file of the page."""
    pages = [Route(path, _response(file), methods=["GET"]) for path, file in _FILES.items()]
    return [Route(FEED_PATH, feed, methods=["GET"]), *pages]


def _response(file: Path) -> Response:
    return Response(file.read_bytes(), headers=_HEADERS, media_type=_TYPES[file.suffix])
