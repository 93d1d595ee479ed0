"""The page of `launch/ask.py --web`, and POST /ask behind it: {"question", "history"?} → the JSON of --compare.

For one person or a few on their own computer: no accounts, nothing kept, nothing fetched from elsewhere. What a browser on this computer
may be made to do by other pages is kept out: other host names (DNS rebinding), other origins, scripts in what is shown.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radit_jax import ask, distributed
from radit_jax.data.questions import Question
from radit_jax.desk import Answerer, Busy, Desk
from radit_jax.errors import InputError
from radit_jax.logbook import say
from radit_jax.pipeline import Pipeline

if TYPE_CHECKING:  # starlette is an extra
    from starlette.requests import Request
    from starlette.responses import Response

PAGE = Path(__file__).parent / "page"
FILES = {"/": ("index.html", "text/html"), "/page.js": ("page.js", "text/javascript"), "/style.css": ("style.css", "text/css")}
FILES["/icon.svg"] = ("icon.svg", "image/svg+xml")
QUESTION, HISTORY, BODY = 2_000, 8_000, 64 << 10  # characters of a question, and of what was said before it; bytes of a request
OWN_HOSTS = ("127.0.0.1", "localhost", "::1", "[::1]")
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
MOST_CONNECTIONS = 100
LAST_ANSWERS_S = 5  # for answers that are being made when the server is stopped


class TooLong(InputError):
    """More than the page takes."""


class WrongType(InputError):
    """Not application/json: what a form of another site can send without asking this server first."""


def serve(make_pipeline: Callable[[], Pipeline], host: str, port: int) -> None:
    """Loads the models and serves until it is stopped. InputError without starlette, and where the port cannot be had."""
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise InputError(f"--web needs {error.name}, which is not installed: pip install -e '.[web]'") from error
    with _listening(host, port) as listening:
        asker = ask.Asker(make_pipeline())
        if distributed.count() > 1:
            raise InputError(f"--web runs as one process, not as {distributed.count()}")
        for name, lacks in asker.missing.items():
            say(f"{name}: not in this workdir ({lacks})")
        asker.load()
        if host not in OWN_HOSTS:
            say(f"ask: whoever reaches {host} can ask; there are no accounts")
        shown = f"[{host}]" if ":" in host else host
        say(f"ask: http://{shown}:{listening.getsockname()[1]}/ (Ctrl-C ends it)")
        how = {"log_level": "warning", "access_log": False, "server_header": False, "limit_concurrency": MOST_CONNECTIONS}
        config = uvicorn.Config(make_app(asker.compare, host), **how, timeout_graceful_shutdown=LAST_ANSWERS_S)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def make_app(answer: Answerer, host: str = "127.0.0.1") -> Callable:
    """The ASGI application, which answers by `answer`. At an address of this computer alone, it wants to be called by such a name."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    desk = Desk(answer)

    async def post(request: Request) -> Response:
        status, value = await _answered(request, desk)
        return JSONResponse(value, status)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        yield
        desk.close()

    hosts = OWN_HOSTS if host in OWN_HOSTS else ("*",)
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    routes = [Route("/ask", post, methods=["POST"]), *(Route(path, _file(*file)) for path, file in FILES.items())]
    return _with_headers(Starlette(routes=routes, middleware=[trusted], lifespan=lifespan))


async def _answered(request: Request, desk: Desk) -> tuple[int, dict[str, Any]]:
    """HTTP status and JSON; what is wrong is {"error": one line}."""
    try:
        return 200, await desk.ask(read_question(await _body(request)))
    except Busy:
        return 503, {"error": "too many questions wait; try again in a moment"}
    except InputError as error:
        status = 413 if isinstance(error, TooLong) else 415 if isinstance(error, WrongType) else 400
        return status, {"error": " ".join(str(error).split())}
    except Exception as error:  # whatever it is, the page says so and the others are served on
        say(f"ask: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
        return 500, {"error": "this question could not be answered; the server's log says why"}


async def _body(request: Request) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise WrongType("expected content-type application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY:
            raise TooLong(f"the request is longer than {BODY:,} bytes")
    return body


def read_question(body: bytes) -> Question:
    """The question of {"question": text, "history"?: [{"role", "content"}]}. InputError for anything else, TooLong past the limits."""
    try:
        record = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError("the request is not JSON") from error
    if not isinstance(record, dict) or not isinstance(record.get("question"), str):
        raise InputError('expected a JSON object with a text "question"')
    if unknown := sorted(set(record) - {"question", "history"}):
        raise InputError(f'unknown field {unknown[0][:40]!r}, expected "question" and "history"')
    text, messages = record["question"], record.get("history", [])
    if len(text) > QUESTION:
        raise TooLong(f"the question has {len(text):,} characters, expected at most {QUESTION:,}")
    if not isinstance(messages, list):
        raise InputError('"history" is no list of {"role", "content"}')
    said = ask.turns((f"history[{n}]", message) for n, message in enumerate(messages))
    if sum(map(len, said)) > HISTORY:
        raise TooLong(f"the history has {sum(map(len, said)):,} characters, expected at most {HISTORY:,}")
    return ask.question(text, said)


def _file(name: str, kind: str) -> Callable:
    from starlette.responses import Response

    content = (PAGE / name).read_bytes()

    async def get(request: Request) -> Response:
        return Response(content, media_type=kind)

    return get


def _with_headers(app: Callable) -> Callable:
    """The application with HEADERS in every response, refusals included."""
    added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def call(scope, receive, send):
        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        await app(scope, receive, send_with_headers)

    return call


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(f"cannot listen at {host} port {port}: {error.strerror or error} (--host, --port)") from error
