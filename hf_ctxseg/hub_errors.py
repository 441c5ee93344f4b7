"""What goes wrong between here and the Hub: soon, in one sentence, with its cure.

Left alone, huggingface_hub waits up to a minute for an answer, without limit where it uploads, and asks again for half
a minute more; a name server that does not answer holds it up as long as it likes.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http

HUB_SECONDS = 4.0  # until a Hub that does not answer counts as unreachable
UPLOAD_SECONDS = 30.0  # the same where it has work to do: taking in a file, making a commit
ATTEMPTS = 2  # of one request

T = TypeVar("T")

# Every failure to reach the Hub is an HTTPError of its HTTP client: httpx or httpx2, as huggingface_hub chooses.
CLIENT_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]


class HubUnreachableError(ConnectionError):
    """The Hub did not answer, or only with errors of its own."""


HUB_ERRORS = (HubUnreachableError, OfflineModeIsEnabled, CLIENT_ERROR)


@contextmanager
def impatient(seconds: float = HUB_SECONDS) -> Iterator[None]:
    """Let no request within wait long for an answer, and none be repeated often; for a download or an upload.

    Files go by plain HTTP: hf_xet, which knows no such limits, goes on for minutes where its server is out of reach.

    Raises:
        HubUnreachableError: A request failed `ATTEMPTS` times or, unless it sends a file, was not answered for
            `seconds`.
    """
    tried: Counter[tuple[str, str, str]] = Counter()
    silent_since: dict[tuple[str, str, str], float] = {}

    def key(request: Any) -> tuple[str, str, str]:
        # A download that goes on where it broke off asks for another range.
        return request.method, str(request.url), request.headers.get("range", "")

    def limit(request: Any) -> None:
        since = silent_since.setdefault(key(request), time.monotonic())
        is_late = request.method != "PUT" and time.monotonic() - since > seconds
        if is_late or tried[key(request)] >= ATTEMPTS:
            raise HubUnreachableError(f"{request.method} {request.url.host}{request.url.path} failed again and again")
        tried[key(request)] += 1
        is_upload = request.method == "PUT" or "/commit/" in request.url.path
        patience = UPLOAD_SECONDS if is_upload else seconds
        timeouts = request.extensions.get("timeout", {})
        limits = {"connect": seconds, "read": patience, "write": patience}
        capped = {kind: min(timeouts.get(kind) or cap, cap) for kind, cap in limits.items()}
        request.extensions = {**request.extensions, "timeout": {**timeouts, **capped}}

    def forget(response: Any) -> None:
        if response.status_code == 429:  # huggingface_hub would sleep as long as the Hub says
            raise HubUnreachableError("it answers 429, too many requests")
        if response.status_code < 500:
            silent_since.pop(key(response.request), None)
            if response.request.method != "GET" or "/resolve/" not in response.request.url.path:
                tried.pop(key(response.request), None)  # of a file, the rest may be missing yet

    def limited(client: Any) -> Any:
        client.event_hooks["request"].append(limit)
        client.event_hooks["response"].append(forget)
        return client

    # After a refused connection huggingface_hub goes on with a new client.
    make_client, without_xet = _http._GLOBAL_CLIENT_FACTORY, constants.HF_HUB_DISABLE_XET
    limited(get_session())
    _http._GLOBAL_CLIENT_FACTORY, constants.HF_HUB_DISABLE_XET = lambda: limited(make_client()), True
    try:
        yield
    finally:
        _http._GLOBAL_CLIENT_FACTORY, constants.HF_HUB_DISABLE_XET = make_client, without_xet
        hooks = get_session().event_hooks
        hooks["request"].remove(limit)
        hooks["response"].remove(forget)


def ask(question: Callable[[], T], seconds: float = 1.6 * HUB_SECONDS) -> T:
    """Give what a call to the Hub gives, whatever it waits for; its own time-out does not cover the name server.

    Raises:
        HubUnreachableError: It took longer, or what answered is not the Hub.
        Exception: What the call raises.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(question())
        except BaseException as error:  # handed to the caller, below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # left behind where it hangs
    thread.start()
    thread.join(seconds)
    if errors and isinstance(errors[0], json.JSONDecodeError):  # the page of a network that wants a log-in
        raise HubUnreachableError("what answers there is not the Hub") from errors[0]
    if errors:
        raise errors[0]
    if not answers:
        raise HubUnreachableError(f"no answer within {seconds:g} s")
    return answers[0]


def is_outage(error: BaseException) -> bool:
    """Whether the Hub could not be reached or is not well, so that a copy in the cache is the next best."""
    if isinstance(error, HfHubHTTPError):
        status: int = error.response.status_code
        return status in (408, 429) or status >= 500
    return isinstance(error, HUB_ERRORS)


def cause_of(error: Exception) -> Exception:
    """The error of the Hub or its client that another one was raised from, or the error itself."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, HUB_ERRORS):
        found = found.__cause__
    return error if found is None else found


def hub_error(error: Exception, name: str, revision: str | None = None, kind: str = "model") -> Exception:
    """Say in one sentence why something of the Hub could not be fetched, and what to do.

    Args:
        error: What huggingface_hub raised.
        name: `namespace/name`.
        revision: The branch, tag or commit that was asked for.
        kind: What it is: a model or a data set, which folders may be, too, or a backbone.

    Returns:
        A `PermissionError`, `ConnectionError`, `FileNotFoundError` or `ValueError`, to be raised.
    """
    endpoint = constants.ENDPOINT
    page = f"{endpoint}/{'datasets/' if kind == 'data set' else ''}{name}"
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError(
            f"{name} is not in the cache, and HF_HUB_OFFLINE is set: unset it, or fetch the {kind} where there is a "
            f"network with `hf download {name}{' --repo-type dataset' if kind == 'data set' else ''}`."
        )
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, _said(error)
        if isinstance(error, GatedRepoError):
            return PermissionError(f"{name} is gated: ask for access on {page}, then log in with `hf auth login`.")
        if isinstance(error, RepositoryNotFoundError):
            here = "" if kind == "backbone" else f"folder {name} here, and no "
            return FileNotFoundError(
                f"There is no {here}{kind} {'of that name' if here else name} at {endpoint}, or it is private: check "
                "the name; for a private one, log in with `hf auth login`."
            )
        if isinstance(error, RevisionNotFoundError):
            return ValueError(f"{name} has no revision {revision!r}: give a branch, tag or commit that {page} lists.")
        if isinstance(error, EntryNotFoundError):
            return FileNotFoundError(f"{name} lacks a file ({error.response.url.path}): ask whoever published it.")
        if status == 401:
            return PermissionError("The Hub does not accept this token: run `hf auth login`, or correct HF_TOKEN.")
        if status == 403:
            return PermissionError(f"This token may not read {name}{said}: ask for access on {page}.")
        if not is_outage(error):
            return ValueError(f"The Hub at {endpoint} answers {status}{said} for {name}: check the name.")
        found = f"The Hub at {endpoint} answers {status}{said}: try again a little later"
    else:
        found = f"The Hub cannot be reached at {endpoint} ({_why(error)}): check the network and HF_ENDPOINT"
    held = "not" if kind == "backbone" else "neither a folder here nor"
    return ConnectionError(f"{found}; {name} is {held} in the cache, which HF_HUB_OFFLINE=1 would open at once.")


def _said(error: HfHubHTTPError) -> str:
    """The Hub's own words, which may be several lines."""
    return f" ({' '.join(error.server_message.split())})" if error.server_message else ""


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, HubUnreachableError) else type(error).__name__


def push_error(error: Exception, repo_id: str, revision: str | None, endpoint: str) -> Exception:
    """Say in one sentence why a push failed, and what to do; `error` is what huggingface_hub raised."""
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it.")
    if not isinstance(error, HfHubHTTPError):
        return ConnectionError(
            f"The Hub cannot be reached at {endpoint} ({_why(error)}): check the network and HF_ENDPOINT, then push "
            "again."
        )
    status = error.response.status_code
    said = _said(error)
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{repo_id} has no branch {revision!r}: make it on the Hub, or leave the revision out.")
    if status == 401:
        return PermissionError("The Hub does not accept this token: run `hf auth login`, or correct HF_TOKEN.")
    if status == 403:
        return PermissionError(f"This token may not write to {repo_id}{said}: use one that may, or another namespace.")
    if status == 404:
        return ValueError(f"{repo_id} was not found at {endpoint}, or this token may not see it: check the name.")
    if status in (409, 412):
        return ValueError(
            f"{repo_id} was changed in the meantime{said}, by someone else or by this push, whose answer was lost: "
            "push again."
        )
    if is_outage(error):
        return ConnectionError(f"The Hub at {endpoint} answers {status}{said}: wait a little, then push again.")
    return ValueError(f"The Hub refused the upload to {repo_id} with status {status}{said}.")
