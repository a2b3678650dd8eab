"""Released files onto the Hugging Face Hub."""

import re
from pathlib import Path

from .errors import InputError

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def check_push(repository: str) -> None:
    """Raises InputError, before anything is made, when nothing could be pushed to OWNER/NAME."""
    from huggingface_hub import get_token

    if not NAME.fullmatch(repository):
        raise InputError(f"push is {repository}: it must be OWNER/NAME, as in hf.co/OWNER/NAME")
    if get_token() is None:
        raise InputError(
            f"push {repository}: no Hugging Face token is set: `hf auth login`, or HF_TOKEN, gives one that may write"
        )


def push_files(repository: str, files: dict[str, Path | bytes], *, private: bool, message: str) -> str:
    """Puts files into a model repository in one commit, making it if need be, and returns its address.

    Other files that it holds stay. Raises InputError when the Hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, operations, commit_message=message)
    except Exception as error:  # of the Hub, of its client and of the network
        cause = f" {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else ""  # of an upload
        said = re.sub(r"For more information check: \S+", "", f"{error}{cause}")
        reason = " ".join(said.split())[:300] or type(error).__name__
        raise InputError(
            f"push {repository}: the Hub did not take it ({reason}): what was written here is whole"
        ) from error
    return str(address)
