"""What is said where a checkpoint's own code is not run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import RemoteCodeError, RemoteCodeRefused
from ..loading.code_files import root_of
from ..loading.source import LocalSource, Source
from .auto_map import CONFIG, MODEL, Reference, parse_reference


def refused(
    name: str, source: Source | None, model_type: Any, named: Mapping[str, Any], wanted: str, code_revision: str | None
) -> RemoteCodeRefused:
    """The error: which file of which commit would have to run, where to read it, and what allows it.

    name, source: of the checkpoint, whose code is neither opened nor requested. named: its ``auto_map``.
    """
    try:
        reference = parse_reference(named.get(wanted, named.get(MODEL, named.get(CONFIG))))
    except RemoteCodeError as error:
        return RemoteCodeRefused(
            f"{name} is of type {model_type!r}, which no class here serves, and the code it names is not run: {error}"
        )
    return RemoteCodeRefused(
        f"{source.describe() if source is not None else name} is of type {model_type!r}, which only code serves that "
        f"comes with it: class {reference.name} in {_where(name, source, reference, code_revision)}. It is not run "
        "unless you allow it: read it there, and if you trust it pass trust_remote_code=True; or "
        "loadstone.register(model_type, config_class, model_class) classes of your own"
    )


def _where(name: str, source: Source | None, reference: Reference, code_revision: str | None) -> str:
    """The path or the address of the code."""
    if isinstance(source, LocalSource) and reference.repository is None:
        directory = getattr(root_of(source), "directory", name)
        return f"{reference.file} ({directory}/{reference.file})"
    commit = None if source is None else source.commit
    if reference.repository is None and commit is None:
        return f"{reference.file} of {name}"
    from huggingface_hub import constants

    repository = reference.repository or name
    revision = code_revision or (commit if repository == name else None) or "main"
    return f"{reference.file} of {repository} ({constants.ENDPOINT}/{repository}/blob/{revision}/{reference.file})"
