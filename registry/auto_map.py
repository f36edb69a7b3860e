"""The references of a config.json's ``auto_map``: ``[repository--]file.Class``, read strictly.

A reference names a Python file of a repository and a class in it. The file may lie in subfolders
(``sub/layers.Class``); the repository is a Hub id, never a path. Source of the grammar: what transformers' dynamic
modules accept, less all that could name anything but a file inside a repository.
"""

from __future__ import annotations

import keyword
import re
from typing import Any, NamedTuple

from ..errors import RemoteCodeError, RepoIdError
from ..loading.source import check_repo_id

CONFIG, MODEL = "AutoConfig", "AutoModelForCausalLM"
_PART = re.compile(r"\w[\w-]*")
_LONGEST = 255


class Reference(NamedTuple):
    """``repository``: a Hub id, or None for the one that holds the configuration; ``file`` ends in ``.py``."""

    repository: str | None
    file: str
    name: str

    @property
    def module(self) -> str:
        """The module's dotted name inside its package."""
        return self.file.removesuffix(".py").replace("/", ".")

    def __str__(self) -> str:
        return f"{self.repository}--{self.module}.{self.name}" if self.repository else f"{self.module}.{self.name}"


def parse_reference(given: Any) -> Reference:
    """Read one reference. Raises RemoteCodeError for anything else than file and class of a repository."""
    if not isinstance(given, str):
        raise _bad(given, f"it is {type(given).__name__}, not a string")
    if len(given) > _LONGEST:
        raise _bad(given[:40] + "...", f"it has {len(given)} characters; {_LONGEST} are the most")
    repository, dashes, rest = given.rpartition("--")
    if dashes:
        try:
            check_repo_id(repository)
        except RepoIdError as error:
            raise _bad(given, f"{repository!r} before '--' is no Hub repository") from error
    file, dot, name = rest.rpartition(".")
    if not dot or "." in file:
        raise _bad(given, "it needs exactly one dot, between the file and the class (folders are separated by '/')")
    parts = file.split("/")
    if not all(_PART.fullmatch(part) for part in parts):
        raise _bad(given, f"{file!r} is not a Python file inside the repository")
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("__"):
        raise _bad(given, f"{name!r} cannot be the name of a class")
    return Reference(repository or None, f"{file}.py", name)


def references(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The ``auto_map`` of a parsed config.json; {} if it has none. Raises RemoteCodeError if it is no object."""
    auto_map = values.get("auto_map")
    if auto_map is None:
        return {}
    if not isinstance(auto_map, dict):
        raise RemoteCodeError(
            f"{name}: auto_map in config.json must be an object of auto classes and references, "
            f"got {type(auto_map).__name__}"
        )
    return auto_map


def _bad(given: Any, why: str) -> RemoteCodeError:
    return RemoteCodeError(f"auto_map names {given!r}: {why}; a reference is 'file.Class' or 'org/name--file.Class'")
