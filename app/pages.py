"""The pages at /docs: Swagger UI, all of it from this process.

A closed network reaches no CDN, and people paste API keys here: the browser is told to load
nothing that is not ours, and to send nothing anywhere else.
"""

import base64
import hashlib
import re

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles
from starlette.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

PAGE = "/docs"
ASSETS = f"{PAGE}/assets"
SCRIPT = re.compile(r"<script>(.*?)</script>", re.S)
PARAMETERS = {"validatorUrl": None}
"""Else the document is shown to a server of Swagger's."""
FILES = StaticFiles(packages=[("fastapi_offline", "static")])
USED = {"swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"}
"""Of those files: what else is there stays unserved, as scripts of this origin may run."""
ALL = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


@router.head(PAGE)
@router.get(PAGE)
async def page(request: Request) -> HTMLResponse:
    root = request.scope.get("root_path", "").rstrip("/")
    answer = get_swagger_ui_html(
        openapi_url=f"{root}{request.app.openapi_url}",
        title=f"{request.app.title} - Swagger UI",
        swagger_js_url=f"{root}{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{root}{ASSETS}/favicon.png",
        swagger_ui_parameters=PARAMETERS,
    )
    answer.headers.update(ALL | {"Content-Security-Policy": _policy(bytes(answer.body).decode())})
    return answer


@router.head(f"{ASSETS}/{{file}}")
@router.get(f"{ASSETS}/{{file}}")
async def asset(file: str, request: Request) -> Response:
    if file not in USED:
        raise HTTPException(404)
    answer = await FILES.get_response(file, request.scope)
    # Its name stays when its content changes: kept, and asked for by its ETag.
    answer.headers.update(ALL | {"Cache-Control": "no-cache"})
    return answer


def _policy(html: str) -> str:
    """No script runs but the bundle and the page's own, which its hash names."""
    scripts = [hashlib.sha256(script.encode()).digest() for script in SCRIPT.findall(html)]
    hashes = " ".join(f"'sha256-{base64.b64encode(script).decode()}'" for script in scripts)
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src 'self' {hashes}",
            "style-src 'self'",
            "img-src 'self' data:",  # its icons
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
