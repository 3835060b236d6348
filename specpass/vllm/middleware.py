"""The HTTP side: headers are read before anything runs, and `usage` says how many tokens reached the engine.

    "usage": {"prompt_tokens": 8000, ..., "prompt_tokens_read": 1024}

An ASGI middleware, which vLLM takes by name (--middleware); it holds back nothing, so that streams stay streams.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from specpass.errors import SpecpassError
from specpass.vllm.asked import CURRENT, HEADER, Asked

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class Middleware:
    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            asked = Asked().but(headers, HEADER)
        except SpecpassError as error:
            return await refuse(send, str(error))
        CURRENT.set(asked)
        return await self.app(scope, receive, Counted(asked, send))


class Counted:
    """Adds the count to every `usage` of a response, streamed or not."""

    def __init__(self, asked: Asked, send: Send) -> None:
        self.asked, self.send = asked, send
        self.start: Message | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message  # its content-length may change with the first part
            return
        body = message.get("body", b"")
        if self.asked.read and b'"usage":{' in body.replace(b" ", b""):
            body = b"\n\n".join(self._with_count(part) for part in body.split(b"\n\n"))
        if self.start is not None:
            start, self.start = self.start, None
            if not message.get("more_body"):
                headers = [pair for pair in start.get("headers", []) if pair[0].lower() != b"content-length"]
                start["headers"] = [*headers, (b"content-length", str(len(body)).encode())]
            await self.send(start)
        await self.send({**message, "body": body})

    def _with_count(self, part: bytes) -> bytes:
        prefix = b"data: " if part.startswith(b"data: ") else b""
        try:
            data = json.loads(part.removeprefix(prefix))
        except ValueError:
            return part
        if not isinstance(data, dict) or not isinstance(data.get("usage"), dict):
            return part
        data["usage"]["prompt_tokens_read"] = self.asked.read
        if self.asked.whole:
            data["usage"]["prompt_whole"] = self.asked.whole
        return prefix + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


async def refuse(send: Send, message: str) -> None:
    """400, in the form of vLLM's own errors."""
    error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
