"""Prompts on the hub: found there, and put there."""

import os
from pathlib import Path

from ptuning.backbone.sources import LoadOptions, hub_folder
from ptuning.errors import FileError
from ptuning.names import CARD_FILE, MANIFEST_FILE, VECTORS_FILE, WEIGHTS_FOLDER

PATTERNS = (MANIFEST_FILE, VECTORS_FILE, CARD_FILE, f"{WEIGHTS_FOLDER}/*")
ADVICE = (
    "give a folder written by ptuning train or save_pretrained, a hub id such as owner/name, or manual:TEMPLATE for a "
    "template without slots"
)


def find_prompt(name: str | Path, asked: LoadOptions) -> Path:
    """Return the folder of a prompt: the one of that name, else the hub's copy of ``owner/name``.

    A FileError if there is neither; it says whether the hub was asked.
    """
    text = os.fspath(name)
    is_id = isinstance(name, str) and text.count("/") == 1 and not text.startswith((".", "/", "~")) and text[-1] != "/"
    if os.path.exists(text) or not is_id:
        return Path(name)
    return Path(hub_folder(text, asked, patterns=PATTERNS, what="prompt", advice=ADVICE, error=FileError))


def push(
    folder: Path, repo_id: str, *, private: bool | None, token: str | bool | None, revision: str | None, message: str
) -> str:
    """Upload the files of a prompt's folder, and return the address of the commit. The repository is made if needed.
    A FileError if the hub refuses or does not answer.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=list(PATTERNS),
            commit_message=message,
            revision=revision,
        )
    except Exception as wrong:
        first = (str(wrong).strip() or type(wrong).__name__).splitlines()[0]
        raise FileError(
            f"cannot push the prompt to '{repo_id}': {first} ({type(wrong).__name__}); check the name, and log in with "
            "hf auth login, HF_TOKEN or token="
        ) from wrong
    return str(done.commit_url)
