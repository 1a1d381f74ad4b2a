"""Receivers of alerts on 127.0.0.1: a web server that answers as it is told, a mail server with TLS."""

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, Envelope
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from devstack.processes import free_port


@dataclass
class Receiver:
    """What a web server was posted, and what it answers next; 200 when nothing is said."""

    url: str = ""
    answers: list[int] = field(default_factory=list)
    headers_sent: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    before: Callable[[], None] = lambda: None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def web() -> Iterator[Receiver]:
    """A web server."""
    received = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            received.headers.append(dict(self.headers.items()))
            received.before()
            time.sleep(received.delay)
            self.send_response(received.answers.pop(0) if received.answers else 200)
            for name, value in received.headers_sent.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"c4n4ry of the receiver")

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *arguments: object) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        received.url = f"http://127.0.0.1:{server.server_port}/hook/c4n4ry-path"
        yield received
        server.shutdown()


@dataclass
class Mailbox:
    """What a mail server took, and whom it refuses."""

    port: int = 0
    mails: list[EmailMessage] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    logins: list[bytes] = field(default_factory=list)
    answer: str = "250 taken"

    async def handle_RCPT(  # noqa: N802 - aiosmtpd names it
        self, _server: object, _session: object, envelope: Envelope, address: str, _: object
    ) -> str:
        if address in self.refused:
            return "550 c4n4ry unknown"
        envelope.rcpt_tos.append(address)
        return "250 ok"

    async def handle_DATA(self, _server: object, _session: object, envelope: Envelope) -> str:  # noqa: N802
        if self.answer.startswith("250") and isinstance(envelope.content, bytes):
            mail = message_from_bytes(envelope.content, policy=default)
            assert isinstance(mail, EmailMessage)
            self.mails.append(mail)
        return self.answer


def certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = directory / "certificate.pem", directory / "key.pem"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


class MailServer(Controller):
    """Awakened by any connection: aiosmtpd's own cannot speak TLS with what a server's context is for."""

    def _trigger_server(self) -> None:
        socket.create_connection((self.hostname, self.port), timeout=5).close()


@contextmanager
def mail(directory: Path, *, implicit: bool = False, tls: bool = True) -> Iterator[Mailbox]:
    """A mail server that wants a login, with STARTTLS, with TLS from the first byte, or with none."""
    box = Mailbox()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate(directory))

    def login(_server: object, _session: object, _envelope: object, _mechanism: str, data: Any) -> AuthResult:
        box.logins.append(data.login)
        return AuthResult(success=data.password == b"c4n4ry-password", handled=False)

    options: dict[str, Any] = {"ssl_context": context} if implicit else {"tls_context": context} if tls else {}
    controller = MailServer(
        box,
        hostname="127.0.0.1",
        port=free_port(),
        authenticator=login,
        auth_require_tls=not implicit,
        **options,
    )
    controller.start()
    box.port = controller.port
    yield box
    controller.stop(no_assert=True)
