"""Publishing a checked adapter: files under their hashes, then the manifest, once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.failpoints import Point, failpoint
from app.storage import ArtifactStore


def publish(
    store: ArtifactStore,
    job_id: str,
    folder: Path,
    result: dict[str, Any],
    still_ours: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Store ``<folder>/adapter`` and return the manifest ``{job_id, adapter, result}``.

    Where an earlier attempt has written the manifest and then died before the row was set, that
    manifest is returned: a job has one adapter, whoever finishes it.
    """
    failpoint(Point.PUBLISH_BEFORE_BLOBS)
    paths = sorted((folder / "adapter").iterdir())
    files = [
        {"name": path.name, "size": path.stat().st_size, "sha256": store.put_file(path)}
        for path in paths
    ]
    size = sum(path.stat().st_size for path in paths)
    adapter = {"files": files, "size": size}
    failpoint(Point.PUBLISH_AFTER_BLOBS)
    still_ours()
    manifest = {"job_id": job_id, "adapter": adapter, "result": result}
    stored = store.put_manifest(job_id, manifest)
    failpoint(Point.PUBLISH_AFTER_MANIFEST)
    return stored
