"""The upload of a saved adapter to the Hub."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError

from .card import CARD

RETRY_AFTER = (1, 2, 4)  # seconds


@dataclass
class Push:
    """An upload to the Hub: of a folder, in one commit."""

    repo_id: str
    private: bool | None = None
    token: bool | str | None = None
    revision: str | None = None
    create_pr: bool = False

    def __post_init__(self) -> None:
        self.api = HfApi(token=self.token)
        self.repo_id = self.api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id

    def fetch_card(self, folder: Path) -> bool:
        """Bring the card that the branch has, so that what is written there stays; whether it has one."""
        if self.revision and not self.create_pr and not self.revision.startswith("refs/"):
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        try:
            shutil.copyfile(self.api.hf_hub_download(self.repo_id, CARD, revision=self.revision), folder / CARD)
        except (EntryNotFoundError, RevisionNotFoundError):  # a repository may have no commit yet
            return False
        return True

    def upload(self, folder: Path, message: str, description: str | None) -> CommitInfo:
        """Upload in one commit. The client asks a Hub that is down again, but not for the commit itself.

        A commit that was made although the answer got lost is not made twice, since nothing would change; a pull
        request would be, so it is not tried again.
        """
        for wait in () if self.create_pr else RETRY_AFTER:
            try:
                return self._upload(folder, message, description)
            except HfHubHTTPError as error:
                if error.response.status_code < 500:
                    raise
            except httpx2.TransportError:
                pass  # the connection broke
            time.sleep(wait)
        return self._upload(folder, message, description)

    def _upload(self, folder: Path, message: str, description: str | None) -> CommitInfo:
        return self.api.upload_folder(
            repo_id=self.repo_id,
            folder_path=folder,
            commit_message=message,
            commit_description=description,
            revision=self.revision,
            create_pr=self.create_pr,
        )
