"""An HTTP proxy that stands before a real server and fails on demand, a chosen number of times."""

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

Kind = Literal["status", "reset", "lost_answer", "reset_body", "cut_body", "stall_body", "slow", "flip_request"]


@dataclass(frozen=True)
class Request:
    """One request as it came; ``outcome`` is the kind of the fault it met, or "ok"."""

    method: str
    path: str
    outcome: str
    headers: dict[str, str]


@dataclass
class Fault:
    """What goes wrong with ``times`` requests of ``method`` whose path and query contain ``path``.

    The first ``skip`` of them pass.

    status: answered with HTTP ``status``, the server never sees it. reset: the connection is reset before any
    answer, the server never sees it. lost_answer: the server does it, the answer is lost in a reset.
    reset_body / cut_body / stall_body: after ``after`` bytes of the answer's body the connection is reset, closed,
    or falls silent for ``seconds``. slow: the request waits ``seconds`` before it is passed on. flip_request: one
    bit of the request's body is turned.
    """

    kind: Kind
    method: str = "GET"
    path: str = ""
    times: int = 1
    skip: int = 0
    status: int = 503
    after: int = 0
    seconds: float = 0.0


@dataclass
class FaultyProxy:
    endpoint: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def inject(self, kind: Kind, **settings: Any) -> Fault:
        fault = Fault(kind, **settings)
        with self.lock:
            self.faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forget the requests that came and the faults still to come."""
        with self.lock:
            self.faults.clear()
            self.requests.clear()

    def seen(self, method: str, path: str = "") -> list[Request]:
        with self.lock:
            return [request for request in self.requests if request.method == method and path in request.path]

    def take(self, method: str, path: str, headers: dict[str, str]) -> Fault | None:
        with self.lock:
            fault = next((f for f in self.faults if f.times > 0 and f.method == method and f.path in path), None)
            if fault is not None and fault.skip > 0:
                fault.skip -= 1
                fault = None
            elif fault is not None:
                fault.times -= 1
            self.requests.append(Request(method, path, fault.kind if fault else "ok", headers))
            return fault


@contextlib.contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """Run a proxy before ``upstream`` (http://host:port) for the length of the block.

    The Host header is passed on untouched, so signatures made for the proxy hold at the server.
    """
    parts = urlsplit(upstream)
    state = FaultyProxy("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            with state.lock:
                state.connections += 1

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle_one_request()
                return
            self.close_connection = True

        def answer(self) -> None:
            fault = state.take(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
            kind = fault.kind if fault else "ok"
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if fault and kind == "status":
                self.send_response(fault.status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if kind == "reset":
                self.reset()
                return
            if fault and kind == "slow":
                time.sleep(fault.seconds)
            if kind == "flip_request":
                body = bytes([body[0] ^ 1]) + body[1:]
            server = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
            with contextlib.closing(server):
                server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        server.putheader(name, value)
                server.endheaders(body or None)
                reply = server.getresponse()
                data = reply.read()
            if kind == "lost_answer":
                self.reset()
                return
            self.send_response_only(reply.status, reply.reason)
            for name, value in reply.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = reply.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            if length is not None and reply.status != 204:
                self.send_header("Content-Length", length)
            self.end_headers()
            if fault and kind in ("reset_body", "cut_body", "stall_body"):
                self.wfile.write(data[: fault.after])
                self.wfile.flush()
                if kind == "stall_body":
                    time.sleep(fault.seconds)
                if kind == "reset_body":
                    self.reset()
                self.close_connection = True
                return
            self.wfile.write(data)

        def reset(self) -> None:
            # With lingering off, closing sends RST where it would have sent FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RD)
            self.close_connection = True

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def shutdown_request(self, request: Any) -> None:
            # The inherited version shuts the socket down first, which would send FIN before a reset.
            self.close_request(request)

    server = Server(("127.0.0.1", 0), Handler)
    state.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
