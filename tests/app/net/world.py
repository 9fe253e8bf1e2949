"""A small internet on the loopback: a site that may be reached, a listener that must not be.

The site is on 127.0.0.2, which tests let count as public; all else of the loopback stays forbidden.
"""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.faults.procs import reserve_port

PUBLIC = "127.0.0.2"
NAME = "rows.test"
NETWORK = f"{PUBLIC}/32"

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Authority:
    """``ca`` is for SSL_CERT_FILE; ``server`` has key and certificate of the site."""

    ca: Path
    server: Path
    stranger: Path
    """A certificate of another name, of the same authority."""


def make_authority(folder: Path) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "the tests")])
    root = _certificate(issuer, issuer, key, key, x509.BasicConstraints(ca=True, path_length=None))
    (folder / "ca.pem").write_bytes(root.public_bytes(serialization.Encoding.PEM))

    def issue(name: str, *names: x509.GeneralName) -> Path:
        own = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        found = _certificate(subject, issuer, own, key, x509.SubjectAlternativeName(names))
        path = folder / f"{name}.pem"
        path.write_bytes(
            own.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + found.public_bytes(serialization.Encoding.PEM)
        )
        return path

    server = issue("site", x509.DNSName(NAME), x509.IPAddress(ip_address(PUBLIC)))
    return Authority(folder / "ca.pem", server, issue("stranger", x509.DNSName("other.test")))


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signing: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> x509.Certificate:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(signing, hashes.SHA256())
    )


@dataclass
class Site:
    """A server whose answers are functions by path; what it was asked is kept."""

    port: int
    scheme: str
    routes: dict[str, Answer] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    otherwise: Answer = field(default_factory=lambda: missing)

    def url(self, path: str = "/", host: str = PUBLIC) -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"


@contextmanager
def serving(certificate: Path | None = None, host: str = PUBLIC) -> Iterator[Site]:
    """A site, with TLS if it has a certificate."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            site.asked.append((self.path, headers))
            path = self.path.partition("?")[0]
            site.routes.get(path, site.otherwise)(self)

        do_GET = do_HEAD = do_POST = do  # noqa: N815 - the server's names

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False  # some tests leave a connection hanging

        def handle_error(self, *_: Any) -> None:
            """Clients go away as they like."""

    # Ours on 127.0.0.1 too, where ``listening`` may take it as long as this lasts.
    with reserve_port() as reserved:
        server = Server((host, reserved.getsockname()[1]), Handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            # The handshake is not made by the thread that accepts: one silent client would stop
            # all.
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        site = Site(server.server_port, "https" if certificate else "http")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield site
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def missing(handler: BaseHTTPRequestHandler) -> None:
    give(b"nothing here", status=404)(handler)


def give(body: bytes, status: int = 200, **headers: str) -> Answer:
    """An answer with its length. ``content_type`` stands for ``Content-Type``."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    return answer


def redirect(location: str, status: int = 302) -> Answer:
    return give(b"", status, Location=location)


@dataclass
class Forbidden:
    """A listener that nobody must reach."""

    sockets: Sequence[socket.socket]
    port: int

    @property
    def was_reached(self) -> bool:
        """The kernel has made a connection, whether anybody has sent on it or not."""
        for listening in self.sockets:
            try:
                listening.accept()[0].close()
            except BlockingIOError:
                continue
            return True
        return False


@contextmanager
def listening(port: int = 0) -> Iterator[Forbidden]:
    """On every address of this machine; on the port of a site only on 127.0.0.1."""
    host = "127.0.0.1" if port else "0.0.0.0"  # noqa: S104 - to be reached
    with socket.create_server((host, port), backlog=4096) as four:
        port = four.getsockname()[1]
        found = [four]
        if socket.has_ipv6:
            with suppress(OSError):  # this machine has none
                found.append(socket.create_server(("::1", port), family=socket.AF_INET6))
        for one in found:
            one.setblocking(False)
        try:
            yield Forbidden(found, port)
        finally:
            for one in found[1:]:
                one.close()


Names = Mapping[str, Sequence[str]]


def answer_names(patch: pytest.MonkeyPatch, names: Callable[[str], Sequence[str]]) -> list[str]:
    """Let every look-up of a name in this process be answered so; who was asked for.

    Addresses are read by the system, in all of their spellings.
    """
    real, asked = socket.getaddrinfo, []

    def look_up(host: Any, port: Any, *arguments: Any, **options: Any) -> list[Any]:
        name = host.decode() if isinstance(host, bytes) else host
        try:
            socket.inet_aton(name)
        except OSError:
            if ":" not in name:
                asked.append(name)
                found = names(name)
                if not found:
                    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known") from None
                kind = options.get("type") or socket.SOCK_STREAM
                return [answer for address in found for answer in real(address, port, type=kind)]
        return real(host, port, *arguments, **options)

    patch.setattr(socket, "getaddrinfo", look_up)
    return asked
