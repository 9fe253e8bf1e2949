"""A small identity provider: it signs, publishes its keys over HTTP, and can go away."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

KINDS: dict[str, Any] = {
    "RS256": lambda: rsa.generate_private_key(65537, 2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}
ALGORITHMS: dict[str, Any] = {"RS256": RSAAlgorithm, "ES256": ECAlgorithm, "EdDSA": OKPAlgorithm}
AUDIENCE = "flatlora"


class Issuer:
    """Answers on a port of this machine.

    Attributes:
        asked: Paths that were asked for.
        status: Of every answer.
        published: What ``jwks_uri`` shows.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.status = 200
        self.published: list[dict[str, Any]] = []
        self.calls_itself: str | None = None
        self.keys: dict[str, tuple[str, Any]] = {}
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked.append(self.path)
                body = json.dumps(issuer.answer(self.path)).encode()
                self.send_response(issuer.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/realms/lab"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def answer(self, path: str) -> dict[str, Any]:
        if path.endswith("/.well-known/openid-configuration"):
            return {"issuer": self.calls_itself or self.url, "jwks_uri": f"{self.url}/certs"}
        return {"keys": self.published}

    def add(self, key_id: str, algorithm: str = "ES256", **more: Any) -> None:
        """Make a key, and publish it beside the others."""
        private = KINDS[algorithm]()
        self.keys[key_id] = algorithm, private
        public = json.loads(ALGORITHMS[algorithm].to_jwk(private.public_key()))
        self.published.append(public | {"kid": key_id, "use": "sig"} | more)

    def sign(self, key_id: str, *, header: dict[str, Any] | None = None, **claims: Any) -> str:
        """A token for the service, good for a minute, of a submitter of the project search."""
        now = int(time.time())
        usual = {
            "iss": self.url, "aud": AUDIENCE, "sub": "u-1", "iat": now, "exp": now + 60,
            "flatlora_project": "search", "flatlora_role": "submitter",
        }  # fmt: skip
        payload = {name: value for name, value in (usual | claims).items() if value is not None}
        algorithm, private = self.keys[key_id]
        return jwt.encode(payload, private, algorithm, headers={"kid": key_id} | (header or {}))

    def __enter__(self) -> "Issuer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """May be called twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def issuing() -> Iterator[Issuer]:
    with Issuer() as issuer:
        issuer.add("k1")
        yield issuer
