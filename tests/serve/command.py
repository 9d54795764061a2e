"""`qvera serve` as a process."""

from __future__ import annotations

from typing import Any

import httpx

from bench.serving import ServerProcess


class Command(ServerProcess):
    """A running `qvera serve`, and calls to it."""

    def post(self, path: str, body: dict[str, Any], **settings: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **settings)

    def chat(self, model: str, text: str, **keys: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, **keys}
        return self.post("/v1/chat/completions", body)
