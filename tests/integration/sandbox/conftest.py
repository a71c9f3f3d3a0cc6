"""A sandbox, a plain client for it, and a webhook behind it."""

import contextlib
import http.client
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.sandbox.options import Options, checked
from pipeline.sandbox.server import run_in_thread
from tests.waiting import patience

CAMPAIGN = "68ecc86fd9fbecbe9431a18e"


LEADS = f"/api/campaigns/{CAMPAIGN}/leads"


HEADERS = {"x-api-key": "sandbox-key", "Content-Type": "application/json"}


class Answer:
    """What a client saw: an answer, or the error that it got instead."""

    def __init__(self, status=None, headers=None, body=b"", error=None):
        self.status, self.headers, self.body, self.error = status, headers or {}, body, error

    @property
    def content(self):
        return json.loads(self.body)


class Client:
    """A plain HTTP client with a connection of its own for each request."""

    def __init__(self, port, timeout_seconds=None):
        self.port, self.timeout_seconds = port, timeout_seconds or patience()

    def request(self, method, path, body=None, headers=HEADERS):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, self.timeout_seconds)) as connection:
            try:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                return Answer(response.status, dict(response.headers), response.read())
            except OSError as error:
                return Answer(error=type(error))

    def post(self, phone="9999789877", data=None, path=LEADS, headers=HEADERS):
        lead = {"recipientPhoneNumber": phone, "recipientData": {"customer_name": "Asha"} if data is None else data}
        return self.request("POST", path, json.dumps(lead), headers)

    def control(self, **changes):
        return self.request("POST", "/_control", json.dumps(changes))

    def get(self, path):
        return self.request("GET", path).content

    def lines(self, path):
        return [json.loads(line) for line in self.request("GET", path).body.splitlines()]


class Hook:
    """A webhook that keeps what it got; `status` is what it answers next."""

    def __init__(self):
        self.bodies, self.headers, self.paths, self.statuses = [], [], [], []
        self.connections = 0
        self.lock = threading.Lock()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                with hook.lock:
                    hook.connections += 1

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with hook.lock:
                    hook.bodies.append(body)
                    hook.headers.append(dict(self.headers))
                    hook.paths.append(self.path)
                    status = hook.statuses.pop(0) if hook.statuses else 200
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # a full queue would cost a second for each connection that does not fit

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?from=futwork"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def hook():
    hook = Hook()
    yield hook
    hook.close()


@pytest.fixture(scope="module")
def shared():
    """One sandbox for all tests that change nothing but its settings; `sandbox` puts these back."""
    with run_in_thread() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(shared):
    shared.change(**Options().model_dump())
    return shared


@pytest.fixture
def client(sandbox):
    return Client(sandbox.port)


@contextlib.contextmanager
def calling(hook, **settings):
    """A sandbox of its own that calls quickly and posts to *hook*."""
    with run_in_thread(checked({"webhook": hook.url, "call_seconds": 0.05} | settings)) as sandbox:
        yield sandbox, Client(sandbox.port)


def settled(sandbox, calls):
    """Wait until *calls* calls were made and each of their events is settled; returns the counters."""
    return sandbox.wait(lambda counters: counters["calls"] == calls and counters["webhooks"]["pending"] == 0)
