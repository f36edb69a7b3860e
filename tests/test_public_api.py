"""The face of the package: every name is there, and everything public says what it does."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import loadstone


def modules() -> Iterator[ModuleType]:
    """Every module of the package; the command's own file runs when imported."""
    for floor in ("errors", "kernels", "quant", "loading", "models", "registry", "cli"):
        module = importlib.import_module(f"loadstone.{floor}")
        yield module
        for info in pkgutil.walk_packages(getattr(module, "__path__", []), f"{module.__name__}."):
            if info.name.rpartition(".")[2].startswith("_"):  # compiled C for ctypes, no module of Python's
                continue
            yield importlib.import_module(info.name)


MODULES = list(modules())


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Classes and functions that a module defines under public names."""
    for name, value in vars(module).items():
        defined_here = getattr(value, "__module__", None) == module.__name__
        if not name.startswith("_") and defined_here and (inspect.isclass(value) or inspect.isfunction(value)):
            yield name, value


def test_every_name_resolves() -> None:
    for name in loadstone.__all__:
        value = getattr(loadstone, name)
        assert value.__name__ == name
        assert (value.__doc__ or "").strip()
        assert name in dir(loadstone)
    with pytest.raises(AttributeError, match="AutoModel'"):
        loadstone.AutoModel  # noqa: B018


def test_the_lists_of_names_agree() -> None:
    assert sorted(loadstone.__all__) == sorted(loadstone._HOME)
    assert len(set(loadstone.__all__)) == len(loadstone.__all__)
    for name, home in loadstone._HOME.items():
        assert getattr(importlib.import_module(home, "loadstone"), name) is getattr(loadstone, name)


def test_from_import_star() -> None:
    names: dict[str, Any] = {}
    exec("from loadstone import *", names)
    assert set(loadstone.__all__) <= set(names)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.removeprefix("loadstone."))
def test_docstrings(module: ModuleType) -> None:
    assert (module.__doc__ or "").strip(), "the module says nothing of itself"
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name), f"__all__ names {name}, which is not there"
    bare = []
    for name, value in public(module):
        if not (inspect.getdoc(value) or "").strip():
            bare.append(name)
        if inspect.isclass(value) and name in loadstone.__all__:  # what users hold in their hands
            for method, function in vars(value).items():
                inner = function.fget if isinstance(function, property) else getattr(function, "__func__", function)
                if not method.startswith("_") and inspect.isfunction(inner):
                    overrides = any(hasattr(base, method) for base in value.__mro__[1:])
                    if not (inner.__doc__ or "").strip() and not overrides:
                        bare.append(f"{name}.{method}")
    assert not bare, f"no docstring: {bare}"


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.removeprefix("loadstone."))
def test_public_functions_are_typed(module: ModuleType) -> None:
    for name, value in public(module):
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
            assert not untyped, f"{name}: {untyped}"
            assert signature.return_annotation is not signature.empty, f"{name} says not what it returns"


def test_errors_are_what_callers_already_catch() -> None:
    from loadstone import errors

    kinds = [value for _, value in public(errors) if inspect.isclass(value)]
    assert len(kinds) > 15
    for kind in kinds:
        assert issubclass(kind, errors.LoadstoneError)
        if kind is not errors.LoadstoneError:
            assert issubclass(kind, (OSError, ValueError, TypeError, RuntimeError, ImportError)), kind
        assert str(kind("one message")) == "one message"
