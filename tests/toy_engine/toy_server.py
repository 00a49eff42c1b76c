"""An engine that is no SGLang's: one route, words of its own, and weights that come as files.

`python toy_server.py PORT FOLDER PARENT`. A response to a prompt is its first token and its seed, modulo 7.
"""

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from safetensors.numpy import load_file


class Toy:
    """The weights, what they are called, and whether they are being changed."""

    def __init__(self, folder):
        self.folder, self.name, self.weights, self.open = folder, "none", {}, False

    def state(self):
        sums = {name: float(values.astype("float64").sum()) for name, values in self.weights.items()}
        return {"folder": self.folder, "name": self.name, "sums": sums}

    def say(self, prompts):
        assert not self.open, "weights are being changed"
        return [
            {"ids": [first, seed % 7][:most], "how": "done", "by": self.name} for first, seed, most in prompts
        ]

    def change(self):
        self.open = True

    def take(self, file):
        assert self.open
        self.weights |= load_file(file)

    def changed(self, name):
        self.open, self.name = False, name

    def read(self, folder, name):
        for file in Path(folder).glob("*.safetensors"):
            self.weights |= load_file(file)
        self.name = name


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        try:
            status, answer = 200, getattr(self.server.toy, asked.pop("what"))(**asked)
        except AssertionError as error:
            status, answer = 400, str(error)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def main():
    port, folder, parent = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.toy = Toy(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while os.getppid() == parent:
        time.sleep(0.1)


if __name__ == "__main__":
    main()
