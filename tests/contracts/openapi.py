"""The OpenAPI document, kept beside the tests so that a change to the contract is seen.

python -m tests.contracts.openapi --write
"""

import json
import sys
from pathlib import Path
from typing import Any

from app.main import create_app
from app.settings import Settings

SNAPSHOT = Path(__file__).parent / "openapi.json"


def document() -> dict[str, Any]:
    return create_app(Settings(data_dir=Path("unused"))).openapi()


def main() -> int:
    if sys.argv[1:] != ["--write"]:
        sys.stderr.write(__doc__ or "")
        return 2
    text = json.dumps(document(), indent=1, ensure_ascii=False, sort_keys=True)
    SNAPSHOT.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
