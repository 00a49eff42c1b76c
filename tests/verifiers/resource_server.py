"""A resource server in NeMo Gym's manner, with one tool: it doubles numbers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ROW = {
    "responses_create_params": {
        "input": [{"role": "user", "content": "Double 21."}],
        "tools": [
            {
                "type": "function",
                "name": "double",
                "description": "Doubles a number.",
                "parameters": {
                    "type": "object",
                    "properties": {"number": {"type": "integer"}},
                    "required": ["number"],
                },
                "strict": True,
            }
        ],
    },
    "expected": "42",
}


class _Handler(BaseHTTPRequestHandler):
    server: ThreadingHTTPServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, body))  # type: ignore[attr-defined]
        data = json.dumps(_answer(self.path, body)).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def _answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
    if path == "/double":
        return {"doubled": 2 * body["number"]}
    if path == "/verify":
        said = [part["text"] for part in body["response"]["output"][-1]["content"]]  # ids hold digits
        right = body["expected"] in " ".join(said)
        return {**body, "reward": float(right), "items": len(body["response"]["output"])}
    return {}


@contextmanager
def resource_server() -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """Its address, and what it is asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
