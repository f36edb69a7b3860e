"""Pushing a checkpoint to the Hub, through huggingface_hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PathError
from .hub import HubOptions
from .hub_answers import EntryMissing, translated
from .save import WeightNames
from .source import check_repo_id

CARD_NAME = "README.md"
LIBRARY = "loadstone"


@dataclass(frozen=True)
class _Target:
    """One branch of one repository, and how it is reached."""

    repo_id: str
    revision: str | None
    options: HubOptions

    def call(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """One call of the Hub's API, its failures told as loadstone's errors."""
        what = f"pushing to repository {self.repo_id!r}"
        return translated(lambda: function(token=self.options.token, **arguments), what, self.options)


def push_directory(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Sequence[str] | str | None = None,
    variant: str | None = None,
) -> Any:
    """Upload a checkpoint's directory in one commit; huggingface_hub's CommitInfo (``.oid``, ``.commit_url``).

    The repository and the branch ``revision`` are made if missing. Weights of the same variant that the new ones
    replace are removed in the same commit. A model card is added if there is none; ``tags`` are added to the one
    there is. Raises PathError, RepoIdError, NotFoundError, GatedError, OfflineError or HubError.
    """
    check_repo_id(repo_id)
    names = WeightNames(variant)
    path = Path(directory)
    if not path.is_dir():
        raise PathError(f"{str(path)!r} is not a directory; push the directory that holds the checkpoint")
    target = _Target(repo_id, revision, HubOptions(token=token))
    _make_repository(target, private)
    card = _card(target, path, [tags] if isinstance(tags, str) else list(tags or ()))
    additions = [one for one in _additions(path) if card is None or one.path_in_repo != CARD_NAME]
    return _commit(
        target,
        [*additions, *([card] if card else []), *_removals(target, path, names)],
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        create_pr=create_pr,
    )


def _make_repository(target: _Target, private: bool | None) -> None:
    from huggingface_hub import HfApi

    target.call(HfApi().create_repo, repo_id=target.repo_id, private=private, exist_ok=True)
    if target.revision is not None and not target.revision.startswith("refs/"):
        target.call(HfApi().create_branch, repo_id=target.repo_id, branch=target.revision, exist_ok=True)


def _additions(folder: Path) -> list[Any]:
    from huggingface_hub import CommitOperationAdd

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder) for path in files]
    kept = [name for name in names if ".git" not in name.parts and not any("saving-" in part for part in name.parts)]
    return [CommitOperationAdd(name.as_posix(), str(folder / name)) for name in kept]


def _removals(target: _Target, folder: Path, names: WeightNames) -> list[Any]:
    """Weights in the repository that a reader would mix with, or prefer to, the ones uploaded."""
    from huggingface_hub import CommitOperationDelete, HfApi

    new = set(os.listdir(folder))
    if not any(names.is_weights(name) for name in new):
        return []
    there = target.call(HfApi().list_repo_files, repo_id=target.repo_id, revision=target.revision)
    return [CommitOperationDelete(name) for name in sorted(there) if names.is_weights(name) and name not in new]


def _commit(target: _Target, operations: list[Any], **options: Any) -> Any:
    from huggingface_hub import HfApi

    return target.call(
        HfApi().create_commit, repo_id=target.repo_id, revision=target.revision, operations=operations, **options
    )


def _card(target: _Target, folder: Path, tags: list[str]) -> Any | None:
    """The model card to upload in place of the folder's own, if any; None to leave things as they are."""
    from huggingface_hub import CommitOperationAdd, ModelCard

    text = _existing_card(target, folder)
    if text is None:
        header = {"library_name": LIBRARY, "pipeline_tag": "text-generation", "tags": tags}
        lines = json.dumps({name: value for name, value in header.items() if value}, indent=2)  # JSON is YAML
        text = f"---\n{lines}\n---\n\n# {target.repo_id.split('/')[-1]}\n\nSaved with {LIBRARY}.\n"
        return CommitOperationAdd(CARD_NAME, text.encode())
    card = ModelCard(text, ignore_metadata_errors=True)
    there = card.data.get("tags") or []
    missing = [tag for tag in tags if tag not in there]
    if not missing:
        return None
    card.data["tags"] = [*there, *missing]
    return CommitOperationAdd(CARD_NAME, str(card).encode())


def _existing_card(target: _Target, folder: Path) -> str | None:
    from huggingface_hub import hf_hub_download

    if (folder / CARD_NAME).is_file():
        return (folder / CARD_NAME).read_text(encoding="utf-8")
    try:
        path = target.call(hf_hub_download, repo_id=target.repo_id, filename=CARD_NAME, revision=target.revision)
    except EntryMissing:
        return None
    return Path(path).read_text(encoding="utf-8")
