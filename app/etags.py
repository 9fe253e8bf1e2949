"""What a client has already, by the names of its bytes, and which form it would like."""


def names(if_none_match: str | None, etag: str) -> bool:
    """Whether ``If-None-Match`` names this ETag (RFC 9110 §13.1.2): a list, or any; weakly."""
    listed = [part.strip().removeprefix("W/") for part in (if_none_match or "").split(",")]
    return "*" in listed or etag in listed


def prefers(accept: str, media_type: str) -> bool:
    """Whether ``Accept`` asks for this form by its name, and JSON is not dearer to the client."""
    wanted = {}
    for part in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weights = [text.removeprefix("q=") for text in parameters if text.startswith("q=")]
        try:
            wanted[name] = float(weights[0]) if weights else 1.0
        except ValueError:
            wanted[name] = 0.0
    return wanted.get(media_type, 0.0) > 0 and wanted[media_type] >= wanted.get(
        "application/json", 0.0
    )
