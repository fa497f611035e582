"""Tokenisers with a chat template: loaded, completed from the settings, refused when unusable."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusion.config import UserError
from fusion.config.files import looks_local
from fusion.config.schema import ModelConfig

TEMPLATES = Path(__file__).parent / "templates"


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerFast:
    """Load the fast tokeniser of `model.path` (folder or hub id) with the chat template that the settings name.

    Raises:
        UserError: there is no such folder, no tokeniser in it, or it has no fast form.
    """
    where = f"{model.name} (path={model.path})"
    if looks_local(model.path) and not Path(model.path).is_dir():
        raise UserError(f"{where}: no such folder; give the folder of a Hugging Face model or a hub id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # damaged files make all kinds of them
        raise UserError(f"{where}: its tokeniser cannot be loaded: {_first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{where}: only fast tokenisers (tokenizer.json) can be aligned; convert it with transformers")
    if model.chat_template:
        tokenizer.chat_template = read_template(model.chat_template, where)
    return tokenizer


def read_template(name: str, where: str) -> str:
    """Text of a built-in template or of a Jinja file."""
    builtin = TEMPLATES / f"{name}.jinja"
    path = builtin if builtin.is_file() else Path(name)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.jinja")))
        raise UserError(f"{where}: chat_template={name} is neither a file nor a built-in template ({names})")
    return path.read_text("utf-8").removesuffix("\n")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
