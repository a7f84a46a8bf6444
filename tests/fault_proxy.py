"""An HTTP proxy in front of an S3 server that spoils the answers it is told to spoil."""

import contextlib
import dataclasses
import http.client
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ERRORS = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}


@dataclasses.dataclass
class Request:
    """A request that came: `sent` counts the bytes of the body that was sent back.

    `key` is the last part of the path, the bucket's name in a listing; `path` has the query, too.
    """

    method: str
    path: str
    key: str
    range: str | None
    fault: object
    headers: dict
    sent: int = 0


class FaultProxy(ThreadingHTTPServer):
    """Passes requests on to an S3 server, with faults; keeps a list of the `requests`.

    `faults` holds, by (method, key), an iterator of what happens to each request in turn; `always`
    holds, by method, what happens to all others:

    | fault    | the client                                                   |
    | -------- | ------------------------------------------------------------ |
    | None     | gets the answer                                              |
    | "403"    | gets 403 AccessDenied                                        |
    | "500"    | gets 500 InternalError                                       |
    | "503"    | gets 503 SlowDown                                            |
    | "silent" | never gets an answer                                         |
    | "drop"   | has its connection reset without an answer                   |
    | "reset"  | has its connection reset in the middle of the body           |
    | "cut"    | has its connection closed in the middle of the body          |
    | "stall"  | gets half the body and then nothing, on an open connection   |
    | callable | gets the answer, after the call, so with what was there then |
    | a tuple  | gets this status, code and, if it is there, message          |

    If `access_keys` names some, then the credentials of all others have expired.
    """

    daemon_threads = True

    def __init__(self, endpoint):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint, self.url = endpoint, f"http://127.0.0.1:{self.server_port}"
        self.faults, self.always, self.requests, self.access_keys = {}, {}, [], None
        self.lock, self.closing = threading.Lock(), threading.Event()

    def next_fault(self, method, key, headers):
        signed_by = (f"Credential={access_key}/" for access_key in self.access_keys or [])
        if self.access_keys and not any(text in headers["Authorization"] for text in signed_by):
            return (400, "ExpiredToken")
        with self.lock:
            return next(self.faults.get((method, key), iter(())), self.always.get(method))

    @contextlib.contextmanager
    def held(self, method):
        """Keep the answers to a method back for a while; yields a function that lists the requests."""
        goes_on = threading.Event()
        self.always[method] = goes_on.wait
        try:
            yield lambda: [request for request in self.requests if request.fault == goes_on.wait]
        finally:
            del self.always[method]
            goes_on.set()

    def shutdown_request(self, request):
        request.close()  # and no orderly end before it, so that a reset is one

    def handle_error(self, request, client_address):
        """Say nothing of clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):  # noqa: N802, the name is BaseHTTPRequestHandler's
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        key = urlsplit(self.path).path.rpartition("/")[2]
        headers = dict(self.headers)
        fault = self.server.next_fault(self.command, key, headers)
        request = Request(self.command, self.path, key, self.headers["Range"], fault, headers)
        self.server.requests.append(request)
        if fault in ERRORS:
            self._error(int(fault), ERRORS[fault])
        elif isinstance(fault, tuple):
            self._error(*fault)
        elif fault == "silent":
            self.server.closing.wait()
        elif fault != "drop":
            self._pass_on(request, body)
        if fault in ("silent", "drop", "reset", "cut", "stall"):
            self.close_connection = True
        if fault in ("drop", "reset"):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def _pass_on(self, request, body):
        """Answer as the S3 server does, up to the fault."""
        connection = http.client.HTTPConnection(urlsplit(self.server.endpoint).netloc, timeout=60)
        with contextlib.closing(connection):
            headers = {name: value for name, value in self.headers.items() if name != "Expect"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            body = answer.read()
        if callable(request.fault):
            request.fault()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        if request.fault in ("reset", "cut", "stall"):
            body = body[: len(body) // 2]
        request.sent = len(body)
        self.wfile.write(body)
        if request.fault == "stall":
            self.server.closing.wait()

    def _error(self, status, code, message="try again"):
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def fault_proxy(endpoint):
    """Run a FaultProxy in front of an S3 endpoint."""
    with FaultProxy(endpoint) as proxy:
        # Every 0.02 seconds it looks whether it shall end; by default, every 0.5.
        threading.Thread(target=proxy.serve_forever, args=[0.02]).start()
        try:
            yield proxy
        finally:
            proxy.closing.set()
            proxy.shutdown()
