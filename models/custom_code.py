"""Classes that are not loadstone's: marking them for the auto classes, and carrying their code along when saving."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ArgumentError, RemoteCodeError, nearest
from ..loading.code_files import CodeFiles, read_reached
from .parallel import class_of

logger = logging.getLogger("loadstone.models")


def check_trust(trust_remote_code: Any) -> bool:
    """Whether a repository's code may run: only ``True`` allows it. Raises ArgumentError for other than bool, None."""
    if trust_remote_code is None or isinstance(trust_remote_code, bool):
        return trust_remote_code is True
    raise ArgumentError(
        f"trust_remote_code must be True, False or None, got {trust_remote_code!r}; only True lets code run"
    )


def check_auto_class(cls: type, auto_class: Any, expected: str) -> str:
    """The name of the auto class that a class is registered for. Raises ArgumentError if it is not ``expected``."""
    name = auto_class if isinstance(auto_class, str) else getattr(auto_class, "__name__", repr(auto_class))
    if name != expected:
        close = nearest(name, [expected])
        raise ArgumentError(f"{cls.__name__} can be registered for {expected}, not for {name!r}{close}")
    if cls.__module__.partition(".")[0] == __name__.partition(".")[0]:
        raise ArgumentError(
            f"{cls.__name__} is loadstone's own, and whoever loads the checkpoint has it; register classes of yours"
        )
    if cls.__module__ == "__main__":
        logger.warning(
            "%s is defined in __main__, so its code cannot be saved along with it; put it into a module of its own",
            cls.__name__,
        )
    return name


def code_of(cls: type) -> CodeFiles | None:
    """The repository's code that a class was loaded from, None for any other class."""
    spec = getattr(sys.modules.get(cls.__module__), "__spec__", None)
    code = getattr(getattr(spec, "loader", None), "code", None)
    return code if isinstance(code, CodeFiles) else None


def carried_code(config: Any, model: Any = None) -> tuple[dict[str, bytes], dict[str, Any] | None]:
    """The code files to save beside config.json, by name, and its ``auto_map`` (None: none).

    Of the configuration and the model those are carried whose class is registered for an auto class, as a repository's
    own classes are when loaded. Other references are made to name their repository, or left out where that is a
    directory, since their files stay behind.
    """
    files: dict[str, bytes] = {}
    auto_map = _kept(getattr(config, "auto_map", None), config)
    for cls in (type(config), class_of(model)):
        name = getattr(cls, "_auto_class", None)
        if name is None:
            continue
        found = _code_for(cls)
        if found is None:
            auto_map.pop(name, None)
            continue
        module, its = found
        folder = _free_folder(files, its)
        files |= {folder + file: content for file, content in its.items()}
        auto_map[name] = f"{folder}{module}.{cls.__name__}"
    return files, auto_map or None


def _code_for(cls: type) -> tuple[str, dict[str, bytes]] | None:
    """The class's module as ``auto_map`` writes it (folders by '/'), and the files; None if there is no file."""
    code = code_of(cls)
    if code is not None:
        module = cls.__module__.partition(".")[2].replace(".", "/")
        if f"{module}.py" not in code.files:
            module += "/__init__"
        return module, {name: file.content for name, file in code.files.items()}
    reason = f"it is defined in {cls.__module__}, not at the top of a module's file"
    try:
        path = Path(inspect.getfile(cls))
        if cls.__module__ != "__main__" and path.suffix == ".py" and cls.__qualname__ == cls.__name__:
            return _module_files(cls.__module__, path)
    except (TypeError, OSError, RemoteCodeError) as error:
        reason = f"{reason} ({error})" if isinstance(error, TypeError) else str(error)
    # No error: at the end of a training, nothing else may be lost for want of a file.
    logger.warning(
        "The code of %s is not saved: %s. Whoever loads the checkpoint has to register the class first",
        cls.__qualname__,
        reason,
    )
    return None


def _module_files(module: str, path: Path) -> tuple[str, dict[str, bytes]]:
    """A module of an installed package and what it imports relatively, in as few folders as there can be."""
    root = path.parents[max(module.count(".") - 1 + (path.name == "__init__.py"), 0)]
    entry = path.relative_to(root).as_posix()
    found = read_reached(lambda name: here if (here := root / name).is_file() else None, [entry])
    shared = PurePosixPath(os.path.commonpath([PurePosixPath(name).parent.as_posix() for name in found]))
    names = {name: PurePosixPath(name).relative_to(shared).as_posix() for name in found}
    return names[entry].removesuffix(".py"), {names[name]: file.content for name, file in found.items()}


def _free_folder(files: Mapping[str, bytes], more: Mapping[str, bytes]) -> str:
    """No folder, or the first one in which ``more`` overwrites no other content."""
    number = 0
    while True:
        folder = f"code_{number}/" if number else ""
        if all(files.get(folder + name, content) == content for name, content in more.items()):
            return folder
        number += 1


def _kept(auto_map: Any, config: Any) -> dict[str, Any]:
    """The references of other classes: whole ones as they are, the others with the repository of the configuration."""
    if not isinstance(auto_map, dict):
        return {}
    own = getattr(type(config), "_auto_class", None)
    repository = config.name_or_path if getattr(config, "_commit_hash", None) else None
    kept: dict[str, Any] = {}
    for name, reference in auto_map.items():
        parts = reference if isinstance(reference, list) else [reference]
        if name == own:
            continue
        if all(part is None or (isinstance(part, str) and (repository or "--" in part)) for part in parts):
            whole = [part if part is None or "--" in part else f"{repository}--{part}" for part in parts]
            kept[name] = whole if isinstance(reference, list) else whole[0]
    return kept
