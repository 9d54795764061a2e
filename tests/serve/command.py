"""`qvera serve` as a process."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from typing import Any

import httpx


class Command:
    """A running `qvera serve`."""

    def __init__(self, *arguments: str) -> None:
        line = [sys.executable, "-m", "qvera", "serve", *arguments, "--port", "0"]
        self.process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        found = None
        assert self.process.stderr is not None
        while found is None:
            text = self.process.stderr.readline()
            assert text, "".join(self.said)
            self.said.append(text)
            found = re.search(r"at (http://\S+)/v1", text)
        self.url = found[1]
        self._reader = threading.Thread(target=lambda: self.said.extend(self.process.stderr or ()))
        self._reader.start()

    def post(self, path: str, body: dict[str, Any], **settings: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **settings)

    def chat(self, model: str, text: str, **keys: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, **keys}
        return self.post("/v1/chat/completions", body)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._reader.join()
        return code
