"""Whether models of the same size have the same tokens: their tokenisers' files compared, which needs no tokeniser."""

import filecmp
import json
from collections.abc import Mapping
from pathlib import Path

from fusion.config import UserError
from fusion.merging.checkpoints.checkpoint import Checkpoint, is_adapter, read_json
from fusion.merging.checkpoints.companions import TOKENIZER_FILE
from fusion.merging.plan import input_labels
from fusion.merging.vocabularies.vocabulary import CHOOSE

SHOWN = 3
VOCABULARY_FILE = "vocab.json"
ADDED_TOKENS = "added_tokens.json"

Ids = Mapping[str, int]


def other_tokens(inputs: Mapping[str, Checkpoint]) -> list[str]:
    """A problem for every input whose tokeniser numbers tokens otherwise than the first one's.

    Folders without a tokeniser are taken to have the first one's tokens, as are tokenisers that do not list their
    tokens in JSON. Files that should be JSON and are not are problems, too.
    """
    (first, *others), roles, labels = inputs.values(), list(inputs), input_labels(inputs)
    problems: list[str] = []
    base_ids = _ids_or_problem(first.folder, roles[0], problems)
    for role, label, other in zip(roles[1:], labels[1:], others, strict=True):
        if is_adapter(other.folder) or _same_file(first.folder, other.folder):
            continue
        found = differences(base_ids, _ids_or_problem(other.folder, role, problems))
        if found:
            shown = "; ".join(
                f"{token} is {_quoted(mine)}, and {_quoted(wanted)} there" for token, wanted, mine in found[:SHOWN]
            )
            problems.append(
                f"{label}: its tokeniser is not that of {labels[0]}: {len(found):,} ids mean something else, such as "
                f"{shown}: {CHOOSE}"
            )
    return problems


def _ids_or_problem(folder: Path, role: str, problems: list[str]) -> Ids:
    try:
        return token_ids(folder)
    except UserError as error:
        problems += [f"{role}: {problem}" for problem in error.problems]
        return {}


def token_ids(folder: Path) -> Ids:
    """Token -> id as the tokeniser's files list them; empty where they do not.

    Raises:
        UserError: a file is not JSON.
    """
    try:
        content = read_json(folder / TOKENIZER_FILE)
        vocab = content.get("model", {}).get("vocab", {})
        pieces = vocab if isinstance(vocab, dict) else {piece: token for token, (piece, _) in enumerate(vocab)}
        added = {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
        return {**pieces, **added} or {**read_json(folder / VOCABULARY_FILE), **read_json(folder / ADDED_TOKENS)}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):  # nothing that could be compared
        return {}


def differences(base: Ids, own: Ids) -> list[tuple[int, str | None, str | None]]:
    """Ids that stand for different tokens, with the token of each of the two.

    An id that only one of them uses may have a token that the other lacks: the other's row there is padding.
    """
    wanted, mine = ({token: piece for piece, token in ids.items()} for ids in (base, own))
    return [
        (token, wanted.get(token), mine.get(token))
        for token in sorted(wanted.keys() | mine.keys())
        if wanted.get(token) != mine.get(token)
        and ((token in wanted and token in mine) or wanted.get(token) in own or mine.get(token) in base)
    ]


def _same_file(base: Path, own: Path) -> bool:
    paths = base / TOKENIZER_FILE, own / TOKENIZER_FILE
    return all(path.is_file() for path in paths) and filecmp.cmp(*paths, shallow=False)


def _quoted(token: str | None) -> str:
    return "nothing" if token is None else json.dumps(token, ensure_ascii=False)
