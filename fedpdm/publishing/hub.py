"""An exported directory on the Hugging Face Hub, with its model card."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from fedpdm.text import line

__all__ = ["HubError", "check_hub", "push_to_hub"]

CARD = "README.md"
MESSAGE = "fedpdm: pipeline with its privacy statement and model card"


class HubError(RuntimeError):
    """The Hub could not be reached, or refused; one line."""


def check_hub(name: str) -> None:
    """What can be known before anything is written or sent: `ValueError`, one line, for a name that
    is none of a repository, and where nobody has logged in."""
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"--push-to-hub: {line(error)}") from None
    if get_token() is None:
        raise ValueError(
            f"--push-to-hub: {line(name)}: nobody has logged in; hf auth login, or set HF_TOKEN"
        )


def push_to_hub(folder: Path, name: str, *, public: bool = False) -> str:
    """Upload an exported directory as it is to the model repository `name`; returns its address.

    A repository that is not there is made, private unless `public`. One that is public is left
    alone without `public`: the fine model was trained on raw images.

    Raises:
        ValueError: one line, if the folder is no export, or the repository is public and `public`
            was not given.
        HubError: one line, if the Hub cannot be reached or refuses.
    """
    for needed in ("model_index.json", CARD):
        if not (folder / needed).is_file():
            raise ValueError(f"{folder}: is not an exported pipeline ({needed} is missing)")
    api = HfApi(library_name="fedpdm")
    try:
        made = api.create_repo(name, private=not public, repo_type="model", exist_ok=True)
        is_public = not api.repo_info(made.repo_id, repo_type="model").private
    except Exception as error:  # the Hub's client raises what its transport does
        raise _failed(name, error) from None
    if is_public and not public:
        raise ValueError(
            f"--push-to-hub: {line(name)} is public, and the fine model was trained on raw images "
            "without noise; nothing was sent. If that is meant, add --public"
        )
    try:
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            repo_type="model",
            commit_message=MESSAGE,
        )
    except Exception as error:
        raise _failed(name, error) from None
    return str(made)


def _failed(name: str, error: Exception) -> HubError:
    """The one line of what went wrong."""
    why = line(error, limit=300) or type(error).__name__
    return HubError(f"--push-to-hub: {line(name)}: {why}")
