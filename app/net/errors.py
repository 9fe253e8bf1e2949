"""Why a URL is not used, or nothing comes from it.

UriError                       code, detail, hint
└── NetError                   is_transient: whether the same may succeed a little later
    ├── UrlMalformed           uri_malformed
    ├── SchemeNotAllowed       uri_scheme_unsupported
    ├── PortNotAllowed         port_not_allowed
    ├── AddressNotAllowed      address_not_allowed
    ├── RedirectNotAllowed     redirect_not_allowed
    ├── HostNotFound           host_not_found
    ├── ConnectionFailed       connection_failed
    ├── TlsFailed              tls_failed
    ├── TimedOut               timed_out
    ├── AnswerRefused          answer_refused
    └── AnswerTooLarge         answer_too_large
"""

import ssl

import httpx2

from app.uris import UriError


class NetError(UriError):
    code = "unreachable"
    is_transient = False

    def __init__(self, detail: str, hint: str | None = None) -> None:
        super().__init__(type(self).code, detail, hint)


class UrlMalformed(NetError):
    code = "uri_malformed"


class SchemeNotAllowed(NetError):
    code = "uri_scheme_unsupported"


class PortNotAllowed(NetError):
    code = "port_not_allowed"

    def __init__(self, host: str, port: int, ports: str) -> None:
        super().__init__(
            f"{host} is asked for on port {port}; expected one of {ports}.",
            "Serve it there, or add the port to FLATLORA_ALLOWED_PORTS.",
        )


class AddressNotAllowed(NetError):
    """It does not say which address a name stands for: that may be nobody's business."""

    code = "address_not_allowed"

    def __init__(self, host: str) -> None:
        super().__init__(
            f"{host} is, or stands for, an address that is not public.",
            "Name a public host, or let the operator add its network to FLATLORA_ALLOWED_NETWORKS.",
        )


class RedirectNotAllowed(NetError):
    code = "redirect_not_allowed"


class HostNotFound(NetError):
    code = "host_not_found"

    def __init__(self, host: str, *, is_transient: bool) -> None:
        super().__init__(f"There is no host {host}, or its name cannot be looked up.",
                         "Check the name.")  # fmt: skip
        self.is_transient = is_transient


class ConnectionFailed(NetError):
    code = "connection_failed"
    is_transient = True


class TlsFailed(NetError):
    code = "tls_failed"


class TimedOut(NetError):
    code = "timed_out"
    is_transient = True


class AnswerRefused(NetError):
    """A status that brings nothing."""

    code = "answer_refused"

    def __init__(self, detail: str, hint: str, *, is_transient: bool = False) -> None:
        super().__init__(detail, hint)
        self.is_transient = is_transient


class AnswerTooLarge(NetError):
    code = "answer_too_large"


def named(error: Exception, host: str) -> NetError:
    """The condition behind an error of the HTTP client."""
    if isinstance(error, NetError):
        return error
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return TimedOut(f"{host} has not answered in time.", "Is the host up, and fast enough?")
    if problem := _tls_problem(error):
        return TlsFailed(
            f"The connection to {host} cannot be trusted: {problem}.",
            "The host needs a certificate for its name, from an authority that is known here "
            "(SSL_CERT_FILE).",
        )
    return ConnectionFailed(
        f"The connection to {host} has failed ({type(error).__name__}).", "Is the host up?"
    )


def _tls_problem(error: BaseException | None) -> str | None:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message.rstrip(".")
        if isinstance(error, ssl.SSLError):
            return (error.reason or "the TLS handshake has failed").replace("_", " ").lower()
        error = error.__cause__ or error.__context__
    return None
