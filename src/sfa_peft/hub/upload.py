"""Uploads a saved adapter to the Hub."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from peft import PeftModel

from .card import CARD, write_card


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
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=message,
        commit_description=description,
        revision=revision,
        create_pr=create_pr,
    )
