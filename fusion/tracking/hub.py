"""Models of the hub as folders: a merge reads safetensors files, wherever they come from."""

from pathlib import Path

from fusion.config import UserError

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def local_folder(path: str, revision: str | None = None, *, download: bool = True, setting: str = "") -> Path:
    """`path` itself, or, where it is no folder here but reads like OWNER/NAME, that model's snapshot of the hub.

    `setting`: what gave the path, for messages.

    Raises:
        UserError: the hub has no such model, or it was not downloaded before and cannot be, or shall not (`download`).
    """
    if Path(path).exists() or not _is_hub_id(path):
        return Path(path)
    from huggingface_hub import snapshot_download

    files, given = list(MODEL_FILES), f"{setting}={path}" if setting else path
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=files, local_files_only=not download))
    except Exception as error:  # of the network, of the hub and of its cache, all kinds of them
        if not download:
            raise UserError(
                f"{given}: no such folder, and not in the hub's cache; a plan downloads nothing, and reads the sizes "
                f"of what is here: `hf download {path}` first, or leave plan=true out"
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{given}: no such folder, and it cannot be had from the hub: {reason}") from error


def _is_hub_id(path: str) -> bool:
    owner, _, name = path.partition("/")
    return bool(owner and name) and "/" not in name and not path.startswith((".", "~"))
