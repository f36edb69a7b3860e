"""Where the model of a command comes from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import DeviceMapError
from ..loading.source import Source, resolve_source
from ..registry.auto import row_for
from ..registry.choice import trust_of
from ..registry.table import Architecture

DEMO = Path(__file__).parent.parent / "models" / "demo"
"""The embedded model: a checkpoint directory inside the package."""


def source_of(arguments: argparse.Namespace) -> Source:
    """The checkpoint that NAME and the options beside it mean; without NAME the embedded model."""
    if arguments.name is None:
        return resolve_source(DEMO, subfolder=arguments.subfolder)
    return resolve_source(arguments.name, **hub_options(arguments), subfolder=arguments.subfolder)


def memory_of(arguments: argparse.Namespace) -> dict[Any, str] | None:
    """``--max-memory`` as a dictionary."""
    pairs = [pair for word in arguments.max_memory or () for pair in word]
    names = [str(device) for device, _ in pairs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise DeviceMapError(f"--max-memory names {', '.join(sorted(twice))} twice")
    return dict(pairs) or None


def hub_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """How the Hub is reached, as keywords; also for code that lies in another repository than the checkpoint."""
    options = {"cache_dir": arguments.cache_dir, "local_files_only": arguments.local_files_only}
    return {**options, "revision": arguments.revision}


def architecture_at(source: Source, arguments: argparse.Namespace) -> Architecture:
    """What serves a checkpoint: its repository's own code where ``--trust-remote-code`` says so."""
    hub = hub_options(arguments)
    trust = trust_of(arguments.trust_remote_code, arguments.code_revision, hub, arguments.revision)
    return row_for(source, None, hub, trust, getattr(arguments, "gguf_file", None))


def split_gguf(arguments: argparse.Namespace) -> None:
    """A NAME that is a GGUF file becomes its directory and ``--gguf-file``."""
    path = Path(arguments.name or "")
    if arguments.gguf_file is None and path.suffix == ".gguf" and path.is_file():
        arguments.name, arguments.gguf_file = str(path.absolute().parent), path.name
