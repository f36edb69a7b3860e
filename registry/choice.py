"""Which class serves a checkpoint: the one registered for its model_type, or its repository's own if that is trusted.

Without trust the registered class, and RemoteCodeRefused if there is none. With trust the repository's own class,
unless a user or a plug-in registered one for the type. Before, nothing of its code is opened, requested or run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, UnsupportedModelError
from ..loading.code_files import CodeFiles, collect, root_of
from ..loading.source import LocalSource, Source, hub_source, resolve_source
from ..models.adapters.source import AdaptedSource
from ..models.custom_code import check_trust, code_of
from . import auto_map, table
from .auto_map import CONFIG, MODEL, Reference
from .table import Architecture

if TYPE_CHECKING:
    from ..models.causal_lm import CausalLM
    from ..models.configuration import PreTrainedConfig

logger = logging.getLogger("loadstone.registry")
_told: set[str] = set()


@dataclass(frozen=True)
class Trust:
    """What the caller allows: ``allowed`` only if they passed trust_remote_code=True, never by a file or a parent.

    code_revision: of the repository that holds the code. hub: the keywords by which the Hub is reached. pinned: the
    caller named the commit of the checkpoint.
    """

    allowed: bool = False
    code_revision: str | None = None
    hub: Mapping[str, Any] = field(default_factory=dict, repr=False)
    pinned: bool = False


def trust_of(trust_remote_code: Any, code_revision: Any, hub: Mapping[str, Any], revision: Any = None) -> Trust:
    """The `Trust` of a call's arguments. Raises ArgumentError for a trust_remote_code that is no bool or None."""
    allowed = check_trust(trust_remote_code)
    if code_revision is not None and not isinstance(code_revision, str):
        raise ArgumentError(f"code_revision is a branch, a tag or a commit, got {type(code_revision).__name__}")
    reached = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    return Trust(allowed, code_revision, reached, isinstance(revision, str) and len(revision) == 40)


def architecture_for(source: Source, values: dict[str, Any], trust: Trust, wanted: str = MODEL) -> Architecture:
    """The row that serves a parsed config.json of ``source``; of a repository's own code if that is trusted and wanted.

    wanted: "AutoConfig" or "AutoModelForCausalLM", the key of ``auto_map`` that counts.
    Raises UnsupportedModelError if nothing serves it, RemoteCodeRefused if only untrusted code does, RemoteCodeError if
    ``auto_map`` is trusted and malformed.
    """
    source = source.base if isinstance(source, AdaptedSource) else source
    model_type, named = values.get("model_type"), values.get("auto_map")
    own = auto_map.references(values, source.name) if trust.allowed else {}
    if wanted in own:
        row = _registered_by_someone(model_type)
        if row is None:
            return _Remote.of(model_type, source.name, own, trust, source=source)
        logger.info("%s: the class that %s registered is used, not the repository's", source.name, row.origin)
        return row
    try:
        if model_type is None:
            raise UnsupportedModelError(
                "config.json has no model_type; registered: "
                f"{', '.join(row.model_type for row in table.list_architectures())}"
            )
        return table.lookup(model_type)
    except UnsupportedModelError as error:
        if isinstance(named, dict) and not trust.allowed and (CONFIG in named or MODEL in named):
            from .refusal import refused

            raise refused(source.name, source, model_type, named, wanted, trust.code_revision) from None
        keys = ", ".join(map(repr, named)) if isinstance(named, dict) else ""
        others = f"; its auto_map serves {keys}, not {wanted}" if keys else ""
        raise UnsupportedModelError(f"{source.name}: {error}{others}") from None


def architecture_of_object(config: PreTrainedConfig, source: Source | None, trust: Trust) -> Architecture:
    """The row that serves a configuration object; ``source``: the checkpoint, None if there is only the object.

    The model's code is that beside the configuration's class if that is a repository's own, else ``source``'s, else
    that of the repository and commit which the configuration was read from.
    """
    values = {"model_type": config.model_type or None, "auto_map": getattr(config, "auto_map", None)}
    name = getattr(config, "name_or_path", "") or type(config).__name__
    own = auto_map.references(values, name)
    if MODEL not in own:
        return table.architecture_of(config)
    if not trust.allowed:
        try:
            return table.architecture_of(config)
        except UnsupportedModelError:
            from .refusal import refused

            raise refused(name, source, config.model_type, own, MODEL, trust.code_revision) from None
    beside = code_of(type(config))
    if beside is not None and trust.code_revision is None:
        reference = auto_map.parse_reference(own[MODEL])
        if reference.repository in (None, beside.repository) and reference.file in beside.files:
            return _Remote.of(config.model_type, name, own, trust, read=beside)
    return architecture_for(_source_of(config, trust) if source is None else source, values, trust)


def is_configuration(given: Any) -> bool:
    """Whether it is a configuration object: loadstone's, or of a class of a repository's code."""
    from ..models.configuration import PreTrainedConfig

    return isinstance(given, PreTrainedConfig) or code_of(type(given)) is not None


def _registered_by_someone(model_type: Any) -> Architecture | None:
    """A row of a user or a plug-in, not one of loadstone's own."""
    try:
        row = table.lookup(model_type)
    except UnsupportedModelError:
        return None
    return None if row.origin == "loadstone" else row


@dataclass(frozen=True)
class _Remote(Architecture):
    """A repository's own classes, loaded when asked for. In no table: it serves the checkpoint that names it."""

    references: Mapping[str, Any] = field(repr=False)
    trust: Trust = field(repr=False)
    source: Source | None = field(repr=False)
    read: CodeFiles | None = field(repr=False)

    @classmethod
    def of(
        cls,
        model_type: Any,
        name: str,
        references: Mapping[str, Any],
        trust: Trust,
        source: Source | None = None,
        read: CodeFiles | None = None,
    ) -> _Remote:
        """A row whose code lies in ``source``, or is ``read`` already."""
        config, model = (str(references.get(key, "")) for key in (CONFIG, MODEL))
        origin = f"the code of {name}"
        return cls(str(model_type or ""), config, model, origin, references, trust, source, read)

    def config_class(self) -> type[PreTrainedConfig]:
        """The class that ``auto_map`` names as AutoConfig, else that of the model. Raises RemoteCodeError."""
        if CONFIG not in self.references:
            return self.model_class().config_class
        from .remote_class import checked_config

        return checked_config(*self._load(CONFIG))

    def model_class(self) -> type[CausalLM]:
        """The class that ``auto_map`` names as AutoModelForCausalLM. Raises RemoteCodeError."""
        if MODEL not in self.references:
            raise UnsupportedModelError(f"auto_map in config.json of {self.origin} names no {MODEL}")
        from .remote_class import checked_model

        return checked_model(*self._load(MODEL))

    def _load(self, wanted: str) -> tuple[type, Reference, CodeFiles]:
        from .remote_package import load_class

        reference = auto_map.parse_reference(self.references[wanted])
        code = self.read or self._collect(reference)
        _tell(code, reference, self.trust)
        return load_class(code, reference), reference, code

    def _collect(self, reference: Reference) -> CodeFiles:
        """The files of both classes together where they lie in one place, so that each module runs once for both."""
        assert self.source is not None
        place = _place(self.source, reference, self.trust)
        if reference.repository is None and self.trust.code_revision is None and place.find(reference.file) is None:
            place = self.source  # in a subfolder, beside the configuration
        entries = [reference.file]
        for key in (CONFIG, MODEL):
            other = auto_map.parse_reference(self.references[key]) if key in self.references else reference
            if other.repository == reference.repository and other.file not in entries and place.find(other.file):
                entries.append(other.file)
        return collect(place, sorted(entries))


def _place(source: Source, reference: Reference, trust: Trust) -> Source:
    """The repository, at its commit, that holds the code."""
    if reference.repository in (None, source.name):
        if trust.code_revision is None:
            return root_of(source)
        if isinstance(source, LocalSource):
            logger.warning("code_revision=%r has no effect, the code lies in a directory", trust.code_revision)
            return root_of(source)
    return hub_source(reference.repository or source.name, revision=trust.code_revision, **trust.hub)


def _tell(code: CodeFiles, reference: Reference, trust: Trust) -> None:
    """Name the commit that runs, once, where the caller left it to a branch."""
    foreign = reference.repository is not None or trust.code_revision is not None
    known = trust.code_revision == code.commit if foreign else trust.pinned
    if code.commit is None or known or code.digest in _told:
        return
    _told.add(code.digest)
    logger.warning(
        "Running code of %s: %s. To run this code and no later one, pass %s=%r.",
        code.place,
        ", ".join(sorted(code.files)),
        "code_revision" if foreign else "revision",
        code.commit,
    )


def _source_of(config: PreTrainedConfig, trust: Trust) -> Source:
    """Where a configuration was read from, at the commit it was read at."""
    if not config.name_or_path:
        raise UnsupportedModelError(
            f"{type(config).__name__} has an auto_map and no name_or_path, so its code cannot be found; use "
            "AutoConfig.from_pretrained(name_or_path, trust_remote_code=True), or set config.name_or_path"
        )
    return resolve_source(config.name_or_path, revision=getattr(config, "_commit_hash", None), **trust.hub)
