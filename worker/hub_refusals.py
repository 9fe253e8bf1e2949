"""What the hub's refusals mean, of models as of datasets."""

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

REFUSED = (RepositoryNotFoundError, RevisionNotFoundError)


def explained(error: Exception, kind: str, name: str, revision: str | None) -> tuple[str, str]:
    """The sentence and the hint for one of ``REFUSED``. ``kind``: model, or dataset."""
    match error:
        case GatedRepoError():  # a RepositoryNotFoundError too
            return f"The hub wants an access token for {name}.", "Set HF_TOKEN for the worker."
        case RepositoryNotFoundError():
            told = f"The hub has no {kind} {name}, or it is private."
            return told, "Check the name, or set HF_TOKEN."
        case _:
            told = f"The {kind} {name} has no revision {revision}."
            return told, "Name a commit, a tag or a branch."
