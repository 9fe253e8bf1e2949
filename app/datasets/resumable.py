"""A dataset that comes in parts, and may break off and go on: at any API process.

The row says how much is here, the parts lie in the store (docs/decisions/0016).
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from functools import partial
from weakref import WeakValueDictionary

from fastapi import Request
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.datasets.digests import compare
from app.datasets.parts import Parts
from app.datasets.repository import DatasetRepository
from app.datasets.schemas import Dataset, UploadState
from app.datasets.service import DatasetService, present
from app.datasets.upload_repository import UploadRepository
from app.datasets.uploads import Upload, check_size, safe_filename, spooled
from app.errors import HashMismatch, OffsetMismatch, TooLarge, UploadMismatch, UploadNotFound
from app.quotas.service import Quotas
from app.sessions import transaction, write_down
from app.settings import Settings
from app.storage import ArtifactStore, Changed, Damaged
from app.tables import UploadRow

MOST_PARTS = 10_000
Open = Callable[..., AbstractAsyncContextManager[AsyncSession]]


class Joins:
    """What an API process joins at present.

    For a large upload that takes minutes: not in threads for which others wait. Whoever asks again
    meanwhile waits for the first, at least in one process.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="join")
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def alone(self, upload_id: str) -> asyncio.Lock:
        return self._locks.setdefault(upload_id, asyncio.Lock())

    async def run(self, join: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, join)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class ResumableUploads:
    """Each method takes the transactions that it needs; none is open while bytes move."""

    def __init__(self, request: Request) -> None:
        self._open: Open = partial(transaction, request)
        self._note = partial(write_down, request)
        self._settings: Settings = request.state.settings
        self._store: ArtifactStore = request.state.store
        self._parts = Parts(self._store)
        self._joins: Joins = request.state.joins

    async def begin(self, sha256: str, filename: str, size: int) -> UploadState:
        """Where to go on; or the dataset, if this project has these bytes."""
        check_size(size, self._settings)
        name = safe_filename(filename, "application/octet-stream")
        upload = None
        while upload is None:  # again, if it was finished by another request between both
            if known := await self._known(Upload(name, size, sha256)):
                return self._complete(known)
            upload = await self._begun(sha256, name, size)
        if upload.received == size:  # whoever was to join the parts has died
            return self._complete(await self._finished(upload))
        return self._state(upload)

    async def show(self, sha256: str) -> UploadState:
        async with self._open() as session:
            upload = await UploadRepository(session).find(sha256)
            dataset = await DatasetRepository(session).by_hash(sha256)
        if upload:
            return self._state(upload)
        if dataset:
            return self._complete(present(dataset))
        raise UploadNotFound(sha256)

    async def append(
        self, sha256: str, start: int, chunks: AsyncIterator[bytes], expected: Collection[str]
    ) -> UploadState:
        """Take a part in. ``expected``: the hashes of this part that the client has named."""
        async with self._open() as session:
            uploads = UploadRepository(session)
            upload = await uploads.find(sha256)
            count = await uploads.count(upload.id) if upload else 0
        if upload is None:
            return await self._repeated(sha256, start)
        if start != upload.received:
            raise OffsetMismatch(start, upload.received)
        if start < upload.size:
            _check_count(count)
            await self._add(upload, chunks, expected)
            async with self._open() as session:
                upload = await UploadRepository(session).find(sha256)
            if upload is None:
                return await self.show(sha256)
        if upload.received == upload.size:
            return self._complete(await self._finished(upload))
        return self._state(upload)

    async def forget(self, sha256: str) -> None:
        async with self._open(writes=True) as session:
            uploads = UploadRepository(session)
            upload = await uploads.find(sha256)
            if upload is None or not await uploads.remove(upload.id):
                raise UploadNotFound(sha256)
            await self._note(session, sha256)
        await asyncio.to_thread(self._parts.forget, upload.folder)

    async def _known(self, wanted: Upload) -> Dataset | None:
        async with self._open() as session:
            row = await DatasetRepository(session).by_hash(wanted.sha256)
        if row is None:
            return None
        if row.size != wanted.size:
            raise HashMismatch(
                f"The {row.size} bytes of {row.id} have this hash; the upload is said to have "
                f"{wanted.size}.",
                "Hash the file again.",
            )
        if not await self._store.holds(wanted.sha256, wanted.size):
            return None  # they are damaged, and the upload repairs that
        async with self._open(writes=True) as session:
            # Held, so that at every moment one of both rows keeps the bytes from being collected.
            if await DatasetRepository(session).held_by_hash(wanted.sha256) is None:
                return None
            dataset, is_new = await DatasetService(session).keep(wanted, self._settings)
            if is_new:
                await self._note(session, dataset.id)
            uploads = UploadRepository(session)
            overtaken = await uploads.find(wanted.sha256)  # the bytes came by another way
            if overtaken:
                await uploads.remove(overtaken.id)
        if overtaken:
            await asyncio.to_thread(self._parts.forget, overtaken.folder)
        return dataset

    async def _begun(self, sha256: str, filename: str, size: int) -> UploadRow | None:
        async with self._open(writes=True) as session:
            uploads = UploadRepository(session)
            upload = await uploads.find(sha256)
            if upload is None:
                await Quotas(session, self._settings).admit_bytes(size, sha256)
                try:
                    async with session.begin_nested():
                        return await uploads.add(sha256=sha256, filename=filename, size=size)
                except IntegrityError:  # begun by another request, a moment ago
                    return None
            if upload.size != size:
                raise UploadMismatch(
                    f"This upload was begun with {upload.size} bytes; found size={size}.",
                    "Only one of both can have this hash. DELETE it to begin anew.",
                )
            return await uploads.touch(upload.id, filename)

    async def _repeated(self, sha256: str, start: int) -> UploadState:
        """The answer to a last part that has arrived before: that one's answer was lost."""
        state = await self.show(sha256)
        if state.dataset is None or start > state.size:
            raise OffsetMismatch(start, state.offset)
        return state

    async def _add(
        self, upload: UploadRow, chunks: AsyncIterator[bytes], expected: Collection[str]
    ) -> None:
        start, folder = upload.received, upload.folder
        check = partial(_check_part, upload=upload, limit=self._settings.max_part_bytes)
        async with spooled(chunks, self._settings.uploads_dir, check) as part:
            compare(part.sha256, expected)
            if part.size == 0:
                return
            name = f"{start:015d}-{secrets.token_hex(8)}"
            await asyncio.to_thread(self._parts.put, folder, name, part.path, part.sha256)
        async with self._open(writes=True) as session:
            uploads = UploadRepository(session)
            counts = await uploads.advance(upload.id, start=start, size=part.size, name=name)
            newest = None if counts else await uploads.find(upload.sha256)
        if counts:
            return
        await asyncio.to_thread(self._parts.delete, folder, name)
        if newest:
            raise OffsetMismatch(start, newest.received)
        await self._repeated(upload.sha256, start)

    async def _finished(self, upload: UploadRow) -> Dataset:
        async with self._joins.alone(upload.id):
            async with self._open() as session:
                parts = await UploadRepository(session).parts(upload.id)
            if not parts:  # another request has finished it, or found that it is none
                return await self._result(upload)
            try:
                await self._joins.run(
                    partial(self._parts.join, upload.folder, parts, upload.sha256)
                )
            except (Changed, Damaged) as error:
                return await self._refuse(upload, error)
            async with self._open(writes=True) as session:
                kept = Upload(upload.filename, upload.size, upload.sha256)
                await UploadRepository(session).remove(upload.id)  # no longer counted twice
                dataset, is_new = await DatasetService(session).keep(kept, self._settings)
                if is_new:
                    await self._note(session, dataset.id)
            await asyncio.to_thread(self._parts.forget, upload.folder)
            return dataset

    async def _refuse(self, upload: UploadRow, error: Changed | Damaged) -> Dataset:
        """Forget an upload that is not what it was said to be."""
        async with self._open(writes=True) as session:
            is_ours = await UploadRepository(session).remove(upload.id)
        if not is_ours:  # another process has joined them, and then taken the parts away
            return await self._result(upload)
        await asyncio.to_thread(self._parts.forget, upload.folder)
        found = f"has the SHA-256 {error.found}" if isinstance(error, Changed) else "is damaged"
        raise HashMismatch(
            f"What has arrived {found}; announced was {upload.sha256}.",
            "It was forgotten: begin again. If that does not help, the file has changed since it "
            "was hashed.",
        ) from error

    async def _result(self, upload: UploadRow) -> Dataset:
        """What another request has made of it, also where a third has begun it anew since."""
        async with self._open() as session:
            dataset = await DatasetRepository(session).by_hash(upload.sha256)
        if dataset is None:
            state = await self.show(upload.sha256)
            raise OffsetMismatch(upload.size, state.offset)
        return present(dataset)

    def _state(self, upload: UploadRow) -> UploadState:
        lifetime = timedelta(hours=self._settings.keep_unreferenced_hours)
        return UploadState(
            sha256=upload.sha256,
            filename=upload.filename,
            size=upload.size,
            offset=upload.received,
            part_size=self._settings.max_part_bytes,
            dataset=None,
            expires_at=upload.updated_at + lifetime,
        )

    def _complete(self, dataset: Dataset) -> UploadState:
        return UploadState(
            sha256=dataset.sha256,
            filename=dataset.filename,
            size=dataset.size,
            offset=dataset.size,
            part_size=self._settings.max_part_bytes,
            dataset=dataset,
            expires_at=None,
        )


def _check_part(size: int, *, upload: UploadRow, limit: int) -> None:
    if size > limit:
        raise TooLarge(
            f"A part may have {limit} bytes.", "Send smaller ones: `part_size` says how large."
        )
    if size > (rest := upload.size - upload.received):
        raise TooLarge(
            f"Of {upload.size} bytes {upload.received} are here; this part has more than the "
            f"{rest} that are missing.",
            "The size in PUT /datasets/uploads is that of the whole file.",
        )


def _check_count(count: int) -> None:
    if count >= MOST_PARTS:
        raise TooLarge(
            f"The upload has {count} parts, and more are not taken.",
            "DELETE it and begin again with larger parts: `part_size` says how large.",
        )
