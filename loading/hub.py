"""Checkpoint files from a Hub repository at one commit, through huggingface_hub and its cache."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import HubError, NotFoundError, OfflineError
from .arrivals import Abandoned, Arrivals
from .glimpse import glimpse
from .hub_answers import EntryMissing, cache_place, offline_mode, translated, unreachable
from .proxies import Proxies, through
from .source import Expected, Source, check_filename, missing_weights
from .verify import check_hash

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
_COMMIT, _SHORT = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{7,39}")
_DOWNLOADS = 8


@dataclass(frozen=True)
class HubOptions:
    """How one repository is reached; the meanings are those of huggingface_hub."""

    cache_dir: str | None = None
    force_download: bool = False
    local_files_only: bool = False
    token: str | bool | None = field(default=None, repr=False)
    subfolder: str = ""
    proxies: Proxies = field(default=(), repr=False)
    verify: bool = False

    def inside(self, filename: str) -> str:
        return f"{self.subfolder}/{filename}" if self.subfolder else filename

    def cached(self, repo_id: str, filename: str, commit: str) -> Path | bool | None:
        """The cached file; False if the repository is known to have none; None if nothing is known."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(repo_id, self.inside(filename), cache_dir=self.cache_dir, revision=commit)
        if path is None:
            return None
        return Path(path) if isinstance(path, str) else False

    def download(
        self,
        repo_id: str,
        filename: str,
        revision: str,
        *,
        cache_only: bool = False,
        watch: Callable[[], None] | None = None,
    ) -> Path:
        """The file in the cache. ``watch`` is called with each part that comes; what it raises ends the download."""
        from huggingface_hub import hf_hub_download

        only_cache = cache_only or self.local_files_only
        path = hf_hub_download(
            repo_id,
            self.inside(filename),
            revision=revision,
            cache_dir=self.cache_dir,
            force_download=self.force_download and not only_cache,
            local_files_only=only_cache,
            token=self.token,
            **_watched(watch),
        )
        return Path(path)

    def folder(self, repo_id: str) -> Path:
        """The repository's place in the cache."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        return Path(self.cache_dir or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")

    def place(self, repo_id: str, filename: str, commit: str) -> Path:
        """Where the cache has the file, or would have it."""
        return self.folder(repo_id) / "snapshots" / commit / self.inside(filename)


@dataclass
class _Memory:
    """What a HubSource has learned: files by name (None: the repository has none), and whether the Hub answers."""

    files: dict[str, Path | None] = field(default_factory=dict)
    online: bool | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, eq=False)
class HubSource(Source):
    """A repository at one commit. Files already in the cache cost no request."""

    options: HubOptions
    _memory: _Memory = field(default_factory=_Memory, repr=False)

    def find(self, filename: str, watch: Callable[[], None] | None = None) -> Path | None:
        """See `Source.find`; ``watch`` as for `HubOptions.download`."""
        check_filename(filename)
        if filename not in self._memory.files:
            path = self._look(filename, watch)
            if path is None and self._memory.online is False:
                return None  # not known to be absent: the next call may find it in the cache
            self._memory.files[filename] = path
        return self._memory.files[filename]

    def require(self, filename: str) -> Path:
        path = self.find(filename)
        if path is None and self._memory.online is False:
            raise OfflineError(
                f"{filename!r} of {self.describe()} is not in the cache ({cache_place(self.options)}); "
                "run once with the network, or copy the repository to a directory and pass that"
            )
        return path if path is not None else super().require(filename)

    def fetch(self, filenames: Sequence[str]) -> list[Path]:
        names = list(dict.fromkeys(filenames))
        if not names:
            return []
        ended = threading.Event()

        def watch() -> None:
            if ended.is_set():
                raise Abandoned("another file failed, or the caller was interrupted")

        with ThreadPoolExecutor(min(_DOWNLOADS, len(names))) as pool:
            try:
                found = dict(zip(names, pool.map(lambda name: self.find(name, watch), names), strict=True))
            except BaseException:
                ended.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        missing = [name for name, path in found.items() if path is None or not path.is_file()]
        if missing and self._memory.online is False:
            raise OfflineError(
                f"{len(missing)} file(s) of {self.describe()} are not in the cache ({cache_place(self.options)}): "
                f"{', '.join(map(repr, missing[:8]))}; run once with the network"
            )
        if missing:
            raise missing_weights(self, missing, "the repository is incomplete at this commit; try another revision")
        return [path for name in filenames if (path := found[name]) is not None]

    def expect(self, filenames: Sequence[str]) -> Expected | None:
        """See `Source.expect`. None too if they must be fetched anew."""
        commit = str(self.commit)
        absent = {
            self.options.place(self.name, name, commit): name
            for name in dict.fromkeys(filenames)
            if self._memory.files.get(name) is None and self.options.cached(self.name, name, commit) is None
        }
        if not absent or self.options.force_download or self._memory.online is False:
            return None
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        inside = self.options.inside
        urls = {file: hf_hub_url(self.name, inside(name), revision=commit) for file, name in absent.items()}
        with through(self.options.proxies):
            headers = glimpse(urls, build_hf_headers(token=self.options.token))
        if headers is None:
            logger.info("the Hub gives no parts of %r; its files are downloaded before they are looked at", self.name)
            return None
        self._memory.online = True

        def download(file: Path, watch: Callable[[], None]) -> Path:
            path = self.find(absent[file], watch)
            if path is None:
                raise missing_weights(self, [absent[file]], "it was there a moment ago; load again")
            return path

        return Expected({absent[file]: header for file, header in headers.items()}, Arrivals(headers, download))

    def listing(self) -> list[str]:
        try:
            if self._memory.online is False:
                raise ConnectionError
            from huggingface_hub import HfApi

            with through(self.options.proxies):
                names = HfApi().list_repo_files(self.name, revision=self.commit, token=self.options.token)
        except Exception:  # only for messages: what the cache holds will do
            return self._cached_listing()
        prefix = self.options.inside("")
        return sorted(name[len(prefix) :] for name in names if name.startswith(prefix))

    def describe(self) -> str:
        limit = f"; only what is cached, the Hub {self._why_offline()}" if self._memory.online is False else ""
        place = f"repository {self.name!r} (commit {str(self.commit)[:12]}{limit})"
        return f"subfolder {self.options.subfolder!r} of {place}" if self.options.subfolder else place

    def _look(self, filename: str, watch: Callable[[], None] | None = None) -> Path | None:
        options, commit = self.options, str(self.commit)
        if not options.force_download or self._memory.online is False:
            known = options.cached(self.name, filename, commit)
            if known is not None:
                return self._verified(filename, known) if isinstance(known, Path) else None
            if not self._reachable(filename):
                return None
        with_context = f"{options.inside(filename)!r} of {self.describe()}"
        try:
            path = translated(lambda: options.download(self.name, filename, commit, watch=watch), with_context, options)
        except EntryMissing:
            return None
        return self._verified(filename, path)

    def _verified(self, filename: str, path: Path) -> Path:
        if self.options.verify:
            check_hash(path, f"{self.options.inside(filename)!r} of {self.describe()}")
        return path

    def _reachable(self, filename: str) -> bool:
        """Whether to ask the Hub: with files cached, a dead Hub must cost one quick request, not long back-offs."""
        with self._memory.lock:
            if self._memory.online is None:
                held = self._memory.files or self.options.cached(self.name, CONFIG_NAME, str(self.commit))
                self._memory.online = not held or _answers(self.name, self.options, filename, str(self.commit))
            return self._memory.online

    def _cached_listing(self) -> list[str]:
        path = next((path for path in self._memory.files.values() if path is not None), None)
        parts = path.parts if path is not None else ()
        if str(self.commit) not in parts:
            return []
        snapshot = Path(*parts[: parts.index(str(self.commit)) + 1], self.options.subfolder)
        return sorted(name for name in os.listdir(snapshot)) if snapshot.is_dir() else []

    def _why_offline(self) -> str:
        if self.options.local_files_only:
            return "may not be asked (local_files_only=True)"
        return "may not be asked (HF_HUB_OFFLINE is set)" if offline_mode() else "cannot be reached"


def _watched(watch: Callable[[], None] | None) -> dict[str, Any]:
    """What makes ``hf_hub_download`` call ``watch``, by way of its progress bar; nothing if this version cannot."""
    if watch is None:
        return {}
    tell: Callable[[], None] = watch
    from inspect import signature

    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm

    if "tqdm_class" not in signature(hf_hub_download).parameters:
        return {}

    class Watched(tqdm):
        def update(self, count: float | None = 1) -> bool | None:
            tell()
            return super().update(count)

    return {"tqdm_class": Watched}


def open_repository(repo_id: str, revision: str | None, options: HubOptions) -> HubSource:
    """The HubSource of ``revision`` (default: main), resolved to its commit once, with the first file fetched."""
    revision = "main" if revision is None else revision
    _check_revision(repo_id, revision)
    closed = options.local_files_only or offline_mode()
    if options.force_download and closed:
        raise OfflineError(
            f"force_download=True needs the Hub, which may not be asked for {repo_id!r} "
            f"({'local_files_only=True' if options.local_files_only else 'HF_HUB_OFFLINE is set'}); drop one of the two"
        )
    memory = _Memory(online=False if closed else None)
    if _COMMIT.fullmatch(revision):
        return HubSource(repo_id, revision, options, memory)
    if closed:
        return HubSource(repo_id, _cached_commit(repo_id, revision, options), options, memory)
    before = options.cached(repo_id, CONFIG_NAME, revision)
    try:
        what = f"{options.inside(CONFIG_NAME)!r} of repository {repo_id!r} at revision {revision!r}"
        path = translated(lambda: options.download(repo_id, CONFIG_NAME, revision), what, options)
    except EntryMissing as missing:
        commit = missing.commit or _ask_commit(repo_id, revision, options)
        memory.files[CONFIG_NAME], memory.online = None, True
        return HubSource(repo_id, commit, options, memory)
    if path != before:
        memory.online = True
    source = HubSource(repo_id, _commit_of(path), options, memory)
    memory.files[CONFIG_NAME] = source._verified(CONFIG_NAME, path)
    return source


def _commit_of(path: Path) -> str:
    """The commit in a cached path: ``.../snapshots/<commit>/...``."""
    parts = path.parts
    for place in range(len(parts) - 2, 0, -1):
        if parts[place - 1] == "snapshots" and _COMMIT.fullmatch(parts[place]):
            return parts[place]
    raise HubError(f"huggingface_hub cached a file at {str(path)!r}, which names no commit; is the cache damaged?")


def _ask_commit(repo_id: str, revision: str, options: HubOptions) -> str:
    """The commit of a revision through the API, for repositories without a config.json."""
    from huggingface_hub import HfApi

    what = f"repository {repo_id!r} at revision {revision!r}"
    try:
        info = translated(lambda: HfApi().model_info(repo_id, revision=revision, token=options.token), what, options)
    except (KeyError, TypeError, AttributeError) as error:  # the client takes the answer apart unchecked
        raise HubError(f"the Hub's answer about {what} is not understood: {type(error).__name__}: {error}") from error
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise HubError(f"the Hub told no commit for {what}")
    return info.sha


def _cached_commit(repo_id: str, revision: str, options: HubOptions) -> str:
    """The commit that the cache holds for a branch or tag; no request."""
    folder = options.folder(repo_id)
    begun = _commit_of_short(folder, revision)
    try:
        commit = begun or (folder / "refs" / revision).read_text(errors="replace").strip()
    except OSError as error:
        reason = "local_files_only=True" if options.local_files_only else "HF_HUB_OFFLINE is set"
        raise OfflineError(
            f"there is no directory {repo_id!r}, and revision {revision!r} of a Hub repository of that name is not in "
            f"the cache ({cache_place(options)}); the Hub may not be asked ({reason})"
        ) from error
    if not _COMMIT.fullmatch(commit):
        raise HubError(f"the cache's reference of {repo_id!r} at {revision!r} is damaged: {str(folder)!r}; remove it")
    return commit


def _commit_of_short(folder: Path, revision: str) -> str | None:
    """The only commit in the cache that begins so, where no branch or tag has that name."""
    if not _SHORT.fullmatch(revision) or (folder / "refs" / revision).exists():
        return None
    there = os.listdir(folder / "snapshots") if (folder / "snapshots").is_dir() else []
    commits = [name for name in there if name.startswith(revision) and _COMMIT.fullmatch(name)]
    if len(commits) > 1:
        raise NotFoundError(f"{revision!r} begins {len(commits)} commits of the cache ({folder}); give more digits")
    return commits[0] if commits else None


def _check_revision(repo_id: str, revision: str) -> None:
    parts = revision.split("/") if isinstance(revision, str) else [""]
    if any(part in ("", ".", "..") for part in parts) or any(char in revision for char in "\\\0 ~^:?*["):
        raise NotFoundError(f"{revision!r} cannot be a revision of {repo_id!r}; give a branch, a tag or a commit hash")


def _answers(repo_id: str, options: HubOptions, filename: str, commit: str) -> bool:
    """Whether the Hub can be reached, by one request without the long back-off that downloads do."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        with through(options.proxies):
            get_hf_file_metadata(hf_hub_url(repo_id, options.inside(filename), revision=commit), token=options.token)
    except Exception as error:
        if unreachable(error):
            logger.warning("The Hub cannot be reached; only cached files of %r are used.", repo_id)
            return False
    return True
