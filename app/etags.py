"""What a client has already, by the names of its bytes."""


def names(if_none_match: str | None, etag: str) -> bool:
    """Whether ``If-None-Match`` names this ETag (RFC 9110 §13.1.2): a list, or any; weakly."""
    listed = [part.strip().removeprefix("W/") for part in (if_none_match or "").split(",")]
    return "*" in listed or etag in listed
