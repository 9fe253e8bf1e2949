"""The API process of ``flatlora up``.

python -m app.serve
"""

import uvicorn

from app.parent import die_with_parent
from app.settings import get_settings


def main() -> None:
    die_with_parent()
    settings = get_settings()
    uvicorn.run(
        "app.main:make_app",
        factory=True,
        host=settings.host,
        port=settings.port,
        forwarded_allow_ips=settings.trusted_proxies,
        access_log=False,  # the app writes its own line per request, with the request id
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=10,
    )


if __name__ == "__main__":
    main()
