"""From what a user names (two tokenisers, a text, a strategy) to a comparison of the two readings of the text."""

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from fusion.alignment.alignment import build_alignment, strategy_builder
from fusion.alignment.corpus import Text
from fusion.alignment.pair import uses_statistics
from fusion.alignment.plain_text import Comparison, Reading
from fusion.alignment.statistics import MappingStatistics
from fusion.alignment.vocabularies import BYTES
from fusion.config import UserError, raise_problems
from fusion.config.compose import CONFIG_FOLDER
from fusion.config.schema import AlignmentConfig, DataConfig, ModelConfig
from fusion.dialogues.encode import Encoder
from fusion.dialogues.load import HALF_CHARACTER, load_dialogues
from fusion.dialogues.reader import Reader, encode_all
from fusion.dialogues.template import ChatFormat, chat_format, require_template
from fusion.dialogues.token_bytes import token_bytes
from fusion.dialogues.tokenizer import load_tokenizer

STDIN = "-"


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    pivot: ModelConfig
    source: ModelConfig
    text: str | None
    """The text itself, or None: it is in `file`."""
    file: str | None
    alignment: str
    path: str | None
    """None: the one that `alignment=NAME` has in training."""
    dialogues: Path | None
    """Dialogues over which statistics are counted; None: over the text."""


def compare(request: Request) -> tuple[Comparison, list[str]]:
    """Both readings under the strategy, and sentences about how they came about.

    Raises:
        UserError: a tokeniser, the text or the strategy that cannot be used; all such problems in one message.
    """
    formats, text, settings = _given(request)
    normalised = unicodedata.normalize("NFC", text)
    pivot, source = (Reading.of(chat, normalised) for chat in formats)
    ours, theirs = formats
    ends = {"pivot_end_of_turn": ours.end_of_turn_id, "source_end_of_turn": theirs.end_of_turn_id}
    statistics, told = None, []
    if uses_statistics(settings.name, settings.options):
        statistics = MappingStatistics(ours.tokenizer, theirs.tokenizer, settings.path, **ends)
        told.append(_count(statistics, request, pivot, source))
    elif request.dialogues:
        told.append(f"alignment={settings.name} uses no statistics: --dialogues was not read.")
    if normalised != text:
        told.append("The text was normalised to NFC, as dialogues are.")
    options = {**ends, "path": settings.path, **settings.options}
    alignment = build_alignment(settings.name, ours.tokenizer, theirs.tokenizer, statistics, **options)
    told += [*_oddities("pivot", pivot), *_oddities("source", source)]
    return Comparison(pivot, source, alignment), [_heading(request, settings, pivot, source), *told]


def _given(request: Request) -> tuple[list[ChatFormat], str, AlignmentConfig]:
    """Chat formats of pivot and source, the text, and the strategy's settings."""
    problems: list[str] = []
    formats: list[ChatFormat] = []
    text, settings = "", _settings(request)
    for model in (request.pivot, request.source):
        with _noted(problems):
            formats.append(_format(model))
    with _noted(problems):
        text = read_text(request)
    with _noted(problems):
        strategy_builder(settings.name, settings.options)
    raise_problems(problems)
    return formats, text, settings


@contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Add the user's mistakes of the block to `problems`, and go on behind it."""
    try:
        yield
    except UserError as error:
        problems += error.problems


def _format(model: ModelConfig) -> ChatFormat:
    tokenizer = load_tokenizer(model)
    token_bytes(tokenizer)  # refuses WordPiece and the like before anything is missed that these do not have
    return chat_format(tokenizer, model.name, model.end_of_turn)


def read_text(request: Request) -> str:
    """The text as it was given; raises UserError if there is none, or it is not UTF-8."""
    text, where = request.text, "--text"
    if text is None:
        where = "the standard input" if request.file == STDIN else str(request.file)
        try:
            content = sys.stdin.buffer.read() if request.file == STDIN else Path(where).read_bytes()
            text = content.decode("utf-8")
        except OSError as error:
            raise UserError(f"{where}: this file cannot be read ({error.strerror}); give a text file") from error
        except UnicodeDecodeError as error:
            problem = f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
            raise UserError(problem) from error
    if not text:
        raise UserError(f"{where}: the text is empty, so there is nothing to align")
    if HALF_CHARACTER.search(text):
        raise UserError(f"{where}: not UTF-8 text; save it as UTF-8 in a file and give that with --file")
    return text


def _settings(request: Request) -> AlignmentConfig:
    """Path and options that the strategy has in training, unless the request says otherwise."""
    file = CONFIG_FOLDER / "alignment" / f"{request.alignment}.yaml"
    written = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
    assert isinstance(written, dict)
    path = request.path or str(written.get("path", AlignmentConfig.path))
    return AlignmentConfig(name=request.alignment, path=path, options=written.get("options", {}))


def _count(counts: MappingStatistics, request: Request, pivot: Reading, source: Reading) -> str:
    """Fill the counts; says over what."""
    if request.dialogues is None:
        counts.add_rows(pivot.rows, source.rows)
        told = "over this text alone; --dialogues FILE counts over a corpus, as training does"
    else:
        models, formats = (request.pivot, request.source), (pivot.chat, source.chat)
        told = f"over {_count_dialogues(counts, models, formats, request.dialogues)}"
    return f"Statistics: {len(counts.counts):,} pairs of tokens, counted {told}."


def _count_dialogues(
    counts: MappingStatistics, models: Sequence[ModelConfig], formats: Sequence[ChatFormat], file: Path
) -> str:
    """Count as an alignment does that trains on these dialogues; says how many they are."""
    dialogues = load_dialogues(str(file))
    require_template(formats[0].tokenizer, models[0].name)
    length = DataConfig.max_length
    readers = [Reader(model, Encoder(own, formats[0], length)) for model, own in zip(models, formats, strict=True)]
    (pivot_tokens, source_tokens), dropped = encode_all(readers, dialogues)
    if not pivot_tokens:
        raise UserError([f"{file}: no dialogue can be read: {reason}" for reason in dropped])
    for name in sorted(pivot_tokens):
        text = Text(pivot_tokens[name], source_tokens[name])
        counts.add_rows(*(text.supervised_rows() if counts.path == BYTES else text.all_rows()))
    return f"{len(pivot_tokens):,} dialogues of {file} ({dropped.total():,} left out)"


def _heading(request: Request, settings: AlignmentConfig, pivot: Reading, source: Reading) -> str:
    sides = [
        f"{model.name} {Path(model.path).name} {len(reading):,} tokens"
        for model, reading in ((request.pivot, pivot), (request.source, source))
    ]
    return f"alignment={settings.name}, path={settings.path}; {len(pivot.content):,} bytes: {', '.join(sides)}"


def _oddities(name: str, reading: Reading) -> list[str]:
    told = []
    if not reading.exact:
        told.append(
            f"The {name}'s tokens do not spell the text (its tokeniser rewrites it): cuts come from character "
            "offsets, and where these prove none, several tokens stand in one box."
        )
    special = reading.special_tokens()
    if special:
        told.append(
            f"The {name} reads {', '.join(special)} as special tokens; dialogues that spell them are not trained on."
        )
    return told
