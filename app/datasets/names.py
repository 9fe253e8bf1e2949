"""What the headers around a file say of its name."""

from contextlib import suppress
from email.message import Message

MAX_FILENAME_BYTES = 200

# The suffix tells the trainer the format; where a name has none, the media type gives it.
SUFFIXES = {
    "application/x-ndjson": ".jsonl",
    "application/jsonl": ".jsonl",
    "application/x-jsonlines": ".jsonl",
    "application/json": ".json",
    "text/csv": ".csv",
    "text/tab-separated-values": ".tsv",
    "application/vnd.apache.parquet": ".parquet",
    "application/parquet": ".parquet",
    "application/octet-stream": "",
    "application/gzip": "",
    "application/x-gzip": "",
    "application/zstd": "",
    "text/plain": "",
}


def disposition_filename(header: str) -> str:
    """The file name in a Content-Disposition header (RFC 6266), if there is one."""
    message = Message()
    message["Content-Disposition"] = header
    with suppress(ValueError):  # a charset that does not hold these bytes
        return message.get_filename("")
    return ""
