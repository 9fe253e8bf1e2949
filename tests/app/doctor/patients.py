"""What the doctor is shown, and how it is asked."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from app.doctor.examination import Run
from app.doctor.finding import Check, Finding, Level
from app.settings import Settings

Found = dict[str, Finding]
Make = Callable[..., Settings]


def look(check: Check, settings: Settings) -> Found:
    """What one check finds; it must say what mends whatever is not in order."""
    found = {finding.name: finding for finding in Run(check, settings).findings()}
    for finding in found.values():
        assert finding.found
        assert finding.level is Level.OK or (finding.expected and finding.mend)
    return found


def levels(found: Found) -> dict[str, str]:
    return {name: finding.level.value for name, finding in found.items()}


@contextmanager
def silent() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@contextmanager
def answering(handle: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A web server that answers every request alike."""

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            handle(self)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do  # noqa: N815 - the server's names

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def empty(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


FAKE_TORCH = """
class Cuda:
    def is_available(self): return GPUS > 0
    def device_count(self): return GPUS
    def get_device_name(self, index): return "NVIDIA H100"
    def mem_get_info(self, index): return 70 << 30, 80 << 30
class Version: cuda = "13.0"
class Tensor:
    def sum(self): return self
    def item(self): return 8
def ones(size, device):
    if device == BROKEN: raise RuntimeError("CUDA error: no kernel image is available")
    return Tensor()
cuda, version, __version__ = Cuda(), Version(), "2.13.0+cu130"
"""
