"""What both kinds of client have in common."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, get_args, get_origin

from flatlora_client.api import Api
from flatlora_client.configuration import Profile, checked, is_loopback
from flatlora_client.http import Wire
from flatlora_client.operations.jobs import JobRef
from flatlora_client.retries import Retries
from flatlora_client.steps import Items

P = ParamSpec("P")
T = TypeVar("T")
J = TypeVar("J")


@dataclass(frozen=True)
class Settings:
    """How a client reaches its service."""

    wire: Wire
    api: Api

    @classmethod
    def load(
        cls,
        url: str | None,
        key: str | None,
        data_dir: Path | None,
        timeout: float,
        max_retries: int,
        retry_seconds: float,
    ) -> "Settings":
        """With what the environment says where nothing is given."""
        profile = Profile.load(url, key, data_dir=data_dir)
        checked(profile.url)
        retries = Retries(most=max_retries, seconds=retry_seconds)
        return cls(Wire(profile.url, profile.key, timeout), Api(profile.url, retries))

    @property
    def trusts_environment(self) -> bool:
        """Whether a proxy that the environment names is used: none reaches this machine."""
        return not is_loopback(self.wire.url)


def of_job(method: Callable[Concatenate[J, JobRef, P], T]) -> Callable[Concatenate[Any, P], T]:
    """A method of jobs as one of a single job."""

    @wraps(method)
    def bound(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return method(self.jobs, self.id, *args, **kwargs)

    whole = signature(method)
    first, _, *rest = whole.parameters.values()
    show(bound, whole.replace(parameters=[first, *rest]))
    return bound


def show_as(method: Callable[..., Any], operation: Callable[..., Any]) -> None:
    """Have help() show what the operation takes, and gives to a caller."""
    found = signature(operation)
    gives: Any = get_args(found.return_annotation)[-1]
    if get_origin(found.return_annotation) is Items:
        gives = Iterator[gives]
    show(method, found.replace(return_annotation=gives))


def show(method: Callable[..., Any], shown: Signature) -> None:
    """Have help() show this signature."""
    vars(method)["__signature__"] = shown
