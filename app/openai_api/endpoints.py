"""The OpenAI-compatible API: another way to the same jobs and datasets."""

from fastapi import APIRouter

from app.openai_api import files, fine_tuning, models

router = APIRouter()
for routes in (files, fine_tuning, models):
    router.include_router(routes.router)
