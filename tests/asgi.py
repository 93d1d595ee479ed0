"""Requests to an ASGI application without a server."""

from __future__ import annotations

import asyncio

JSON = "application/json"


def request(app, method: str, path: str, body=b"", *, host="127.0.0.1:7860", kind=JSON, part=1 << 16) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one request to an ASGI application, which reads the body in parts."""
    parts = [body[start : start + part] for start in range(0, len(body), part)] or [b""]
    messages = [{"type": "http.request", "body": one, "more_body": n + 1 < len(parts)} for n, one in enumerate(parts)]
    sent: list[dict] = []

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = [(b"host", host.encode("latin-1")), (b"content-type", kind.encode("latin-1"))]
    scope = {"type": "http", "http_version": "1.1", "scheme": "http", "method": method, "path": path, "raw_path": path.encode()}
    scope |= {"query_string": b"", "headers": headers, "server": ("127.0.0.1", 7860), "client": ("127.0.0.1", 1), "root_path": ""}
    asyncio.run(app(scope, receive, send))
    head = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], head, b"".join(message.get("body", b"") for message in sent[1:])
