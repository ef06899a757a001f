"""Uploads a saved adapter to the Hub."""

from __future__ import annotations

import glob
import shutil
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from peft import PeftModel

from ..checkpoint.seal import CONFIG
from .base import BASE_CONFIG
from .card import CARD, folder_of, outdated, write_card


def upload(
    model: PeftModel,
    folder: Path,
    repo_id: str,
    *,
    message: str,
    description: str | None,
    private: bool | None,
    token: bool | str | None,
    revision: str | None,
    create_pr: bool,
    tags: Sequence[str],
) -> CommitInfo:
    """Upload a folder with saved adapters in one commit. Text that users have added to the model card is kept.

    Files of an earlier push that the adapters have none of any more are deleted in the same commit; see `outdated`.

    Args:
        model: The model that the adapters were saved from.
        folder: The folder with the saved adapters.
        repo_id: The repository. It is created if it does not exist.
        message, description: Of the commit.
        private, token, revision, create_pr, tags: As in `push_to_hub`.
    """
    for base in {config.base_model_name_or_path or "" for config in model.peft_config.values()}:
        if base and Path(base).exists():
            warnings.warn(
                f"the adapter names {base!r} as its base model, a folder that others do not have. Push the base "
                f"too, and tell them to pass `base=` to load_dense; or load it from the Hub before the next training.",
                stacklevel=4,
            )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with suppress(EntryNotFoundError, RevisionNotFoundError):  # the repository may be empty
        shutil.copyfile(api.hf_hub_download(repo_id, CARD, revision=revision), folder / CARD)
    if not write_card(model, folder, repo_id, is_repo=True, tags=tags):
        (folder / CARD).unlink(missing_ok=True)  # the repository keeps its own
    deleted: list[str] = []
    for own in (folder_of(folder, name) for name in model.peft_config):
        place, earlier = own.relative_to(folder), None
        if (own / CONFIG).is_file():
            with suppress(EntryNotFoundError, RevisionNotFoundError):
                config = (place / BASE_CONFIG).as_posix()
                earlier = Path(api.hf_hub_download(repo_id, config, revision=revision)).read_bytes()
            deleted += [(place / file).as_posix() for file in outdated(own, earlier)]
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        delete_patterns=[glob.escape(name) for name in deleted] or None,
        commit_message=message,
        commit_description=description,
        revision=revision,
        create_pr=create_pr,
    )
