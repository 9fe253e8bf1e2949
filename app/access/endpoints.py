"""The routes of keys, for the admins of a project."""

from fastapi import APIRouter, Depends, Request

from app.access.dependencies import Asking, admins_only
from app.access.keys import make_key
from app.access.principal import Principal
from app.access.repository import add_key, all_keys, revoking
from app.access.schemas import Key, KeyCreate, KeyList, KeyMade
from app.errors import Forbidden, InvalidRequest, KeyNotFound, Unauthenticated
from app.problems import problems
from app.sessions import ReadSession, WriteSession, note_change
from app.tables import ApiKeyRow

router = APIRouter(prefix="/keys", tags=["keys"], dependencies=[Depends(admins_only)])


@router.post(
    "",
    status_code=201,
    responses=problems(Unauthenticated, Forbidden, InvalidRequest),
    summary="Make a key",
)
async def create_key(
    body: KeyCreate, asking: Asking, session: WriteSession, request: Request
) -> KeyMade:
    """The answer is the only place where the key is shown."""
    new = make_key()
    session.sync_session.info["project"] = _project(body, asking)
    row = await session.scalar(
        add_key(new, name=body.name, role=body.role, lifetime=body.lifetime, by=asking.actor)
    )
    note_change(request, new.id)
    return KeyMade(**_present(row).model_dump(), key=new.key)


@router.get("", responses=problems(Unauthenticated, Forbidden), summary="List keys, newest first")
async def list_keys(session: ReadSession) -> KeyList:
    return KeyList(items=[_present(row) for row in await session.scalars(all_keys())])


@router.delete(
    "/{key_id}",
    responses=problems(Unauthenticated, Forbidden, KeyNotFound),
    summary="Revoke a key",
)
async def revoke_key(key_id: str, session: WriteSession) -> Key:
    """Repeatable. It opens nothing more within five seconds."""
    row = await session.scalar(revoking(key_id)) if key_id.isalnum() else None
    if row is None:
        raise KeyNotFound(key_id)
    return _present(row)


def _project(body: KeyCreate, asking: Principal) -> str:
    if body.project in {None, asking.project}:
        return asking.project
    if not asking.is_operator:
        raise Forbidden(
            f"This key belongs to the project {asking.project!r}, and makes keys of no other; "
            f"found {body.project!r}.",
            "Leave project out, or ask the operator: flatlora keys create --project …",
        )
    assert body.project
    return body.project


def _present(row: ApiKeyRow) -> Key:
    return Key.model_validate(row, from_attributes=True)
