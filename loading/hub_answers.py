"""What huggingface_hub raises, told as loadstone's errors: what failed, why, and what to do; never with the token."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import GatedError, HubError, NotFoundError, OfflineError, RepoIdError, WriteError
from .proxies import through

if TYPE_CHECKING:
    from .hub import HubOptions

_T = TypeVar("_T")


class EntryMissing(Exception):
    """The repository has no such file at this revision; ``commit`` if the answer told it."""

    def __init__(self, commit: str | None) -> None:
        super().__init__(commit)
        self.commit = commit


def translated(call: Callable[[], _T], what: str, options: HubOptions) -> _T:
    """``call()``, its failures told as loadstone's errors; EntryMissing if the file is not in the repository."""
    try:
        with through(options.proxies):
            return call()
    except Exception as error:
        mapped = _translate(error, what, options)
        if mapped is None:
            raise
        raise mapped from error


def _translate(error: Exception, what: str, options: HubOptions) -> Exception | None:
    from huggingface_hub import errors as hub

    cause = error.__cause__ if isinstance(error, hub.LocalEntryNotFoundError) else None
    status = _status(error) or _status(cause)
    said = _said(cause or error, options)
    if status in (401, 403) and not isinstance(error, hub.RepositoryNotFoundError):
        return GatedError(f"{what}: the Hub refused access; check the token ({said})")
    if isinstance(error, hub.HFValidationError):
        return RepoIdError(f"{what}: not a well-formed repository id; {said}")
    if isinstance(error, hub.LocalEntryNotFoundError):
        if offline_mode() or options.local_files_only:
            return OfflineError(f"{what} is not in the cache ({cache_place(options)}), and the Hub may not be asked")
        return OfflineError(
            f"{what} is not in the cache ({cache_place(options)}), and the Hub did not answer as it should: "
            f"{said}; check the network and HF_ENDPOINT, then try again"
        )
    if isinstance(error, hub.EntryNotFoundError):
        return EntryMissing(_header(error, "X-Repo-Commit"))
    if isinstance(error, hub.GatedRepoError):
        return GatedError(f"{what}: access is gated; ask for it on its Hub page, then pass token= or log in ({said})")
    if isinstance(error, hub.RevisionNotFoundError):
        return NotFoundError(f"{what}: there is no such branch, tag or commit ({said})")
    if isinstance(error, hub.RepositoryNotFoundError):
        return NotFoundError(
            f"{what}: neither a directory nor a Hub repository of that name exists, or it is private and needs "
            f"token= ({said})"
        )
    if unreachable(error):
        return OfflineError(f"{what}: the Hub cannot be reached ({said}); check the network and HF_ENDPOINT")
    if isinstance(error, OSError) and error.errno:
        return WriteError.of(error, f"{what} cannot be put into the cache ({cache_place(options)})")
    if isinstance(error, (OSError, ValueError, _transport_error())):
        return HubError(f"{what}: the transfer failed ({said})")
    if type(error) is RuntimeError and isinstance(
        error.__cause__, Exception
    ):  # of an upload, with the reason behind it
        mapped = _translate(error.__cause__, what, options)
        return HubError(f"{what}: the upload failed ({said})") if isinstance(mapped, EntryMissing) else mapped
    return None


def unreachable(error: BaseException) -> bool:
    """No connection, a timeout, offline mode, or a Hub that answers 5xx or 429."""
    status = _status(error)
    names = {kind.__name__ for kind in type(error).__mro__}  # of requests or httpx: versions of huggingface_hub differ
    return status == 429 or status >= 500 or bool(names & {"ConnectionError", "Timeout", "TransportError"})


def _status(error: BaseException | None) -> int:
    """The HTTP status an error carries; 0 if none."""
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _transport_error() -> type[BaseException]:
    """The base of the HTTP library's errors, whichever this version of huggingface_hub uses."""
    from huggingface_hub.errors import HfHubHTTPError

    bases = [kind for kind in reversed(HfHubHTTPError.__mro__) if kind.__name__ in ("HTTPError", "RequestException")]
    return bases[0] if bases else HfHubHTTPError


def _said(error: BaseException, options: HubOptions) -> str:
    """The first line of an error's text, without the token."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if isinstance(options.token, str) and options.token:
        text = text.replace(options.token, "***")
    return text


def _header(error: Any, name: str) -> str | None:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    return headers.get(name)


def offline_mode() -> bool:
    """Whether the environment says that the Hub is not to be asked."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cache_place(options: HubOptions) -> str:
    """The directory of the cache, in words."""
    from huggingface_hub import constants

    return str(options.cache_dir or constants.HF_HUB_CACHE)
