"""A stand-in for an engine: speaks the contract, records what it is asked, and fails as it is told."""

import json
import socket
import struct
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VOCAB = 50


class StandIn:
    """Speaks the contract; a response to a prompt is [first token of the prompt, seed % 50]."""

    def __init__(self):
        self.version = "3"
        self.asked = []  # (path, body) in order
        self.keys = []  # the authorization of each request
        self.change = lambda answers: answers  # what a test does to /generate's answers
        self.answers = {}  # path → (status, bytes), in place of the usual
        self.fault = None  # what happens to a connection in place of an answer: see `Handler.fail`
        self.faulty = "/generate"  # the path that it happens to
        self.model_path = "/nowhere"
        self.go_on = threading.Event()  # held back while it is clear
        self.go_on.set()
        self.over = threading.Event()  # the end of the test
        self.unready = 0  # questions after its health that it denies
        self.together = None  # a barrier that this many requests must reach

    def generate(self, body):
        if isinstance(body["sampling_params"], dict):  # one response, as a router asks for
            [answer] = self.generate({name: [body[name]] for name in ("input_ids", "sampling_params")})
            return answer
        answers = []
        for prompt, params in zip(body["input_ids"], body["sampling_params"], strict=True):
            tokens = [prompt[0], params["sampling_seed"] % VOCAB]
            meta = {
                "finish_reason": {"type": "stop", "matched": tokens[-1]},
                "weight_version": self.version,
                "output_token_logprobs": [[-0.25 * (i + 1), token, None] for i, token in enumerate(tokens)],
            }
            answers.append({"text": "", "output_ids": tokens, "meta_info": meta})
        return self.change(answers)

    def answer(self, path, body):
        if path == "/generate":
            return self.generate(body)
        if path.startswith("/update_weights_from"):
            self.version = body.get("weight_version", self.version)
            return {"success": True, "message": ""}
        if path == "/model_info":
            return {"weight_version": self.version, "model_path": self.model_path}
        return {"tp_size": 1, "dtype": "float32"} if path == "/server_info" else {}


class Handler(BaseHTTPRequestHandler):
    def serve(self):
        stand_in = self.server.stand_in
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "null")
        stand_in.asked.append((self.path, body))
        stand_in.keys.append(self.headers["authorization"])
        if stand_in.together:
            stand_in.together.wait(timeout=30)
        stand_in.go_on.wait(timeout=30)
        path = self.path.split("?")[0]
        if stand_in.fault and path == stand_in.faulty:
            self.fail(stand_in.fault)
            return
        try:
            status, data = stand_in.answers.get(path) or (
                200,
                json.dumps(stand_in.answer(path, body)).encode(),
            )
        except ConnectionAbortedError:  # a test's `change` wants no answer
            self.fail("closed")
            return
        if path == "/health" and stand_in.unready:
            status, stand_in.unready = 503, stand_in.unready - 1
        self.reply(status, data, len(data))

    def reply(self, status, data, length):
        with suppress(ConnectionError):  # who asked no longer waits
            self.send_response(status)
            self.send_header("content-length", str(length))
            self.end_headers()
            self.wfile.write(data)

    def fail(self, fault):
        if fault == "silent":  # accepts, and never answers
            self.server.stand_in.over.wait(timeout=60)
        if fault == "truncated":
            self.reply(200, b'[{"output_ids": [1', 1000)
        if fault == "reset":  # closed with a RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()  # all that "closed" does

    do_GET = do_POST = serve

    def log_message(self, *_):
        pass


@contextmanager
def stand_ins(count):
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(count)]
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in servers]
    for server, thread in zip(servers, threads, strict=True):
        server.stand_in = StandIn()
        thread.start()
    try:
        yield (
            [server.stand_in for server in servers],
            [f"http://127.0.0.1:{server.server_address[1]}" for server in servers],
        )
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.stand_in.go_on.set()
            server.stand_in.over.set()
            server.shutdown()
            server.server_close()
            thread.join()
