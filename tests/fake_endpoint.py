"""An OpenAI-compatible endpoint on localhost that answers as it is told to, well or badly."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, **message):
    """Returns the body of a good answer."""
    return {"choices": [{"message": {"content": text, **message}, "finish_reason": "stop"}]}


class FakeEndpoint:
    """What the endpoint was asked, and how it answers.

    ``answer(body, number)`` returns what to send for a request: an object (sent as JSON with status 200), a pair of
    status and object or text, a triple with headers too, or an iterator of bytes to send one after another.
    """

    def __init__(self, answer):
        self.answer = answer
        self.models = {"data": [{"id": "served"}]}
        self.bodies = []
        self.headers = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        self.url = ""


@contextmanager
def serving(answer):
    fake = FakeEndpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            self.reply(fake.models if self.path == "/v1/models" else (404, "nothing here"))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                number = len(fake.bodies)
                fake.bodies.append(body)
                fake.headers.append(dict(self.headers))
                fake.busy += 1
                fake.busiest = max(fake.busiest, fake.busy)
            try:
                self.reply(fake.answer(body, number) if self.path == "/v1/chat/completions" else (404, "nothing here"))
            finally:
                with fake.lock:
                    fake.busy -= 1

        def reply(self, answer):
            status, content, *headers = answer if isinstance(answer, tuple) else (200, answer)
            try:
                self.send_response(status)
                for name, value in dict(*headers).items():
                    self.send_header(name, value)
                if hasattr(content, "__next__"):
                    self.end_headers()
                    self.close_connection = True
                    for piece in content:
                        self.wfile.write(piece)
                        self.wfile.flush()
                    return
                raw = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def dripping(seconds=5.0):
    """Sends a space now and then, and never an answer."""
    for _ in range(int(seconds / 0.05)):
        yield b" "
        time.sleep(0.05)
