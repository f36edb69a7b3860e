"""Where an adapter's files and its base model's come from; all of adapters that a load without one imports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, RepoIdError
from ...loading.source import Expected, Source, check_repo_id, resolve_source

CONFIG = "adapter_config.json"


@dataclass(frozen=True, eq=False)
class AdaptedSource(Source):
    """The files of a base model, with the adapter that is to go on top of it."""

    base: Source
    adapter: Source

    def find(self, filename: str) -> Path | None:
        return self.base.find(filename)

    def fetch(self, filenames: Sequence[str]) -> list[Path]:
        return self.base.fetch(filenames)

    def expect(self, filenames: Sequence[str]) -> Expected | None:
        return self.base.expect(filenames)

    def listing(self) -> list[str]:
        return self.base.listing()

    def describe(self) -> str:
        return self.base.describe()

    def require(self, filename: str) -> Path:
        return self.base.require(filename)


def with_base(source: Source, hub: dict[str, Any]) -> Source:
    """An `AdaptedSource` if ``source`` is an adapter, else ``source``.

    The base is what adapter_config.json names, at its ``revision``; a directory that holds config.json too is its own
    base. hub: the caller's keywords for the Hub; of these ``revision`` and ``subfolder`` are the adapter's only.
    Raises ConfigError if no base is named; RepoIdError if a Hub adapter names a place on this machine.
    """
    if isinstance(source, AdaptedSource):
        return source
    complete = source.find("config.json") is not None
    if complete and source.commit is not None:
        return source  # a Hub repository with a configuration is a model: no further request
    if source.find(CONFIG) is None:
        return source
    if complete:
        return AdaptedSource(source.name, source.commit, source, source)
    from .files import read_config  # the rest of adapters is for those who have one

    config = read_config(source)
    name = config.base_model_name_or_path
    if not name:
        raise ConfigError(
            f"{CONFIG} of {source.describe()} names no base model (base_model_name_or_path); load the base, then call "
            "model.load_adapter(path)"
        )
    if source.commit is not None:
        try:
            check_repo_id(name)
        except RepoIdError as error:
            raise RepoIdError(
                f"the adapter of {source.describe()} names as its base {name!r}, which is no Hub repository; an "
                "adapter from the Hub cannot choose a path here. Load the base, then call model.load_adapter(...)"
            ) from error
    options = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
    base = resolve_source(name, **options, revision=config.revision)
    if base.find("config.json") is None:
        raise ConfigError(f"the base {name!r} that {CONFIG} of {source.describe()} names has no config.json")
    return AdaptedSource(base.name, base.commit, base, source)
