"""A proxy in front of the S3 server that makes scripted mistakes, once or for as long as they last."""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Mistake = Literal[
    "503",
    "500",
    "reset",
    "reset mid-part",
    "answer lost",
    "no answer",
    "damaged on the way",
    "cut off",
    "damaged on the way back",
    "credentials expired",
    "decrypt denied",
    "another region",
    "conditional writes met",
]
# What S3 answers in its own name: status, code, message.
ERRORS: Mapping[Mistake, tuple[int, str, str]] = {
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "500": (500, "InternalError", "We encountered an internal error."),
    "credentials expired": (400, "ExpiredToken", "The provided token has expired."),
    "decrypt denied": (403, "AccessDenied", "User: arn:aws:sts::1:x is not authorized to perform: kms:Decrypt on it"),
    "another region": (301, "PermanentRedirect", "The bucket must be addressed using another endpoint."),
    "conditional writes met": (409, "ConditionalRequestConflict", "A conflicting operation occurred."),
}


@dataclass(frozen=True)
class Request:
    """One request as it arrived.

    Attributes:
        method: GET, PUT …
        path: with the query.
        headers: names in lower case.
    """

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Faults:
    """What goes wrong next, by method and a piece of the path.

    Attributes:
        url: of the proxy.
        script: (method, piece of the path, mistake), each used once, in order.
        lasting: the same, used until it is taken away.
        made: the mistakes made so far.
        requests: everything that arrived.
        silence_seconds: how long "no answer" is silent.
    """

    url: str = ""
    script: list[tuple[str, str, Mistake]] = field(default_factory=list)
    lasting: list[tuple[str, str, Mistake]] = field(default_factory=list)
    made: list[Mistake] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    silence_seconds: float = 1.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, method: str, path: str, headers: Mapping[str, str]) -> Mistake | None:
        with self.lock:
            self.requests.append(Request(method, path, headers))
            for script in (self.script, self.lasting):
                for number, (its_method, piece, mistake) in enumerate(script):
                    if its_method == method and piece in path:
                        if script is self.script:
                            del script[number]
                        self.made.append(mistake)
                        return mistake
        return None


@contextmanager
def faulty_s3(endpoint: str) -> Iterator[Faults]:
    """Serve the S3 server of `endpoint` with faults."""
    upstream = urlsplit(endpoint)
    faults = Faults()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # an answer of two packets waits 40 ms otherwise

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

        def answer(self) -> None:
            mistake = faults.take(
                self.command, self.path, {name.lower(): value for name, value in self.headers.items()}
            )
            length_sent = int(self.headers.get("Content-Length") or 0)
            if mistake == "reset mid-part":
                self.rfile.read(length_sent // 2)
                self.reset()
                return
            body = self.rfile.read(length_sent)
            if mistake is not None and mistake in ERRORS:
                self.error(*ERRORS[mistake])
                return
            if mistake == "reset":
                self.reset()
                return
            if mistake == "damaged on the way":
                body = body[:-1] + bytes([body[-1] ^ 1])
            connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            content = response.read()
            connection.close()
            if mistake == "no answer":
                time.sleep(faults.silence_seconds)
            if mistake in ("answer lost", "no answer"):
                self.reset()
                return
            if mistake == "damaged on the way back":
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.send_response_only(response.status)
            for name, value in response.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if mistake == "cut off":
                self.wfile.write(content[: len(content) // 2])
                self.reset()
                return
            self.wfile.write(content)

        def error(self, status: int, code: str, message: str) -> None:
            body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

    for method in ("GET", "PUT", "HEAD", "DELETE", "POST"):
        setattr(Handler, f"do_{method}", Handler.answer)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a reset connection is the point

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    faults.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield faults
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
