"""The OpenAI-compatible API: another way to the same jobs and datasets."""

from fastapi import APIRouter

from app.openai_api import files, fine_tuning, models
from app.openai_api.shape import PREFIX

router = APIRouter(prefix=PREFIX, tags=["openai"])
for routes in (files, fine_tuning, models):
    router.include_router(routes.router)
