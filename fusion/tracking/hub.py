"""Models of the hub as folders: a merge reads safetensors files, wherever they come from."""

from pathlib import Path

from fusion.config import UserError

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def local_folder(path: str, revision: str | None = None) -> Path:
    """`path` itself, or, where it is no folder here but reads like OWNER/NAME, that model's snapshot of the hub.

    Raises:
        UserError: the hub has no such model, or cannot be reached and the model was not downloaded before.
    """
    if Path(path).exists() or not _is_hub_id(path):
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(MODEL_FILES)))
    except Exception as error:  # of the network, of the hub and of its cache, all kinds of them
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: no such folder, and it cannot be had from the hub: {reason}") from error


def _is_hub_id(path: str) -> bool:
    owner, _, name = path.partition("/")
    return bool(owner and name) and "/" not in name and not path.startswith((".", "~"))
