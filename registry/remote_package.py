"""A repository's code as a package of its own in sys.modules, run from memory.

Each place, commit and content has a name of its own, at the top level: two repositories, or two commits of one, never
share a module, and a relative import cannot leave its repository. A first load that fails leaves nothing behind.
Notable: the top folder's ``__init__.py`` is not run (transformers does not either); those of subfolders are.
"""

from __future__ import annotations

import atexit
import importlib
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import lru_cache
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import decode_source, spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from ..errors import RemoteCodeError
from ..loading.code_files import CodeFiles
from .auto_map import Reference
from .table import closed_to_this_thread

PREFIX = "_loadstone_code_"
_lock = threading.RLock()  # one for all: code of a repository may load another's
_packages: dict[str, CodeFiles] = {}


def load_class(code: CodeFiles, reference: Reference) -> type:
    """Run the module of ``reference`` if it has not run yet, and give its class.

    Raises RemoteCodeError naming file and line, with the cause, if the code fails or has no such class; what it had put
    into sys.modules under its package's name is gone again then.
    """
    top = package_name(code)
    with _lock:
        if _FINDER not in sys.meta_path:
            sys.meta_path.append(_FINDER)
        code = _packages.setdefault(top, code)
        before = set(_modules(top))
        try:
            with closed_to_this_thread():
                value = getattr(importlib.import_module(f"{top}.{reference.module}"), reference.name, None)
            if not isinstance(value, type):
                raise _no_class(code, reference, value)
            return value
        except BaseException as error:
            _forget(top, before)
            if isinstance(error, RemoteCodeError) and error.__cause__ is None and not _line_in(code, error):
                raise
            if isinstance(error, (Exception, SystemExit)):
                raise _failed(code, top, reference, error) from error
            raise


def package_name(code: CodeFiles) -> str:
    """The top-level name of a repository's package: readable, and unique by its digest."""
    last = re.sub(r"\W+", "_", "_".join(code.repository.split("/")[-2:]))[-40:].strip("_")
    return f"{PREFIX}{last}_{code.digest[:16]}"


def give_files(code: CodeFiles) -> None:
    """Let the package's modules name copies of their files, as they were read, as their ``__file__``.

    For classes that copy their modules' files when saved, in the way of transformers: the directory that a model came
    from may be the one it is saved to, and may have changed. The copies go when the process ends.
    """
    top = package_name(code)
    for name in _modules(top):
        loader = getattr(sys.modules[name].__spec__, "loader", None)
        if isinstance(loader, _Loader) and loader.file is not None and code.commit is None:
            for file, held in code.files.items():
                place = _copies() / top / file
                if not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(held.content)
            sys.modules[name].__file__ = str(_copies() / top / loader.file)


@lru_cache(maxsize=1)
def _copies() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="loadstone-code-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class _Loader(InspectLoader):
    """Runs one module from the bytes that were read; ``code`` is what the package consists of."""

    def __init__(self, code: CodeFiles, file: str | None, is_package: bool) -> None:
        self.code, self.file, self._is_package = code, file, is_package

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if self.file is None:
            return
        try:
            compiled = self.get_code(module.__name__)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            error.loadstone_file = self.file  # type: ignore[union-attr]
            raise
        exec(compiled, module.__dict__)

    def is_package(self, fullname: str) -> bool:
        return self._is_package

    def get_code(self, fullname: str) -> CodeType | Any:
        if self.file is None:
            return compile("", "<folder of a repository>", "exec")
        file = self.code.files[self.file]
        return compile(file.content, str(file.path), "exec", dont_inherit=True)

    def get_source(self, fullname: str) -> str | None:
        return None if self.file is None else decode_source(self.code.files[self.file].content)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top, _, rest = fullname.partition(".")
        code = _packages.get(top)
        if code is None:
            return None
        name = rest.replace(".", "/")
        if rest and f"{name}.py" in code.files:
            return _spec(fullname, code, f"{name}.py", is_package=False)
        if rest and f"{name}/__init__.py" in code.files:
            return _spec(fullname, code, f"{name}/__init__.py", is_package=True)
        if not rest or any(file.startswith(f"{name}/") for file in code.files):
            return _spec(fullname, code, None, is_package=True)
        return None


def _spec(fullname: str, code: CodeFiles, file: str | None, *, is_package: bool) -> ModuleSpec | None:
    origin = None if file is None else str(code.files[file].path)
    spec = spec_from_loader(fullname, _Loader(code, file, is_package), origin=origin, is_package=is_package)
    if spec is not None and origin is not None:
        spec.has_location = True  # gives the module its __file__
    return spec


_FINDER = _Finder()


def _modules(top: str) -> list[str]:
    return [name for name in list(sys.modules) if name == top or name.startswith(f"{top}.")]


def _forget(top: str, before: set[str]) -> None:
    """Take out of sys.modules, and off their packages, what came since ``before``."""
    for name in _modules(top):
        if name not in before:
            module = sys.modules.pop(name)
            parent, _, child = name.rpartition(".")
            if vars(sys.modules.get(parent, module)).get(child) is module:
                delattr(sys.modules[parent], child)
    if top not in before:
        _packages.pop(top, None)


def _line_in(code: CodeFiles, error: BaseException) -> tuple[str, int] | None:
    """File and line of the innermost frame that belongs to the repository."""
    names = {str(file.path): name for name, file in code.files.items()}
    found = None
    traceback = error.__traceback__
    while traceback is not None:
        name = names.get(traceback.tb_frame.f_code.co_filename)
        found = (name, traceback.tb_lineno) if name is not None else found
        traceback = traceback.tb_next
    if isinstance(error, SyntaxError) and error.filename in names:
        return names[error.filename], error.lineno or 1
    uncompiled = getattr(error, "loadstone_file", None)
    return (uncompiled, 1) if uncompiled is not None else found


def _failed(code: CodeFiles, top: str, reference: Reference, error: BaseException) -> RemoteCodeError:
    file, line = _line_in(code, error) or (reference.file, 1)
    what = f"{file}:{line} of {code.place} failed: {type(error).__name__}: {error}"
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and missing.startswith(f"{top}."):
        name = missing.removeprefix(f"{top}.").replace(".", "/")
        return RemoteCodeError(
            f"{file}:{line} of {code.place} imports {name!r} relatively, and there is no {name}.py or "
            f"{name}/__init__.py; the code is incomplete (modules are found by the import statements in the files)"
        )
    if missing is not None:
        package = missing.partition(".")[0]
        return RemoteCodeError(f"{what}; the code needs the package {package!r}: install it, then load again")
    return RemoteCodeError(f"{what}; the fault is in the repository's code, nothing of which stays loaded")


def _no_class(code: CodeFiles, reference: Reference, value: Any) -> RemoteCodeError:
    found = "no" if value is None else f"a {type(value).__name__}, not a class, under the name"
    return RemoteCodeError(
        f"{reference.file} of {code.place} holds {found} {reference.name!r}, which auto_map in config.json names; "
        "correct the one or the other"
    )
