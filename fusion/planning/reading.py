"""How much there is to read: counted where the dialogues are on the disk, else what is known or at most possible."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fusion.config import UserError
from fusion.config.schema import EstimateConfig, TrainConfig
from fusion.planning.shapes import WORLD

BYTES_PER_TOKEN = 4
"""Of English text; other languages have fewer."""
KEYS_SHARE = 0.9
"""Of the bytes of a JSON row, what is contents."""
SUPERVISED = 0.7
"""Share of the tokens that assistants say."""
WORLD_TOKENS = 40


@dataclass(frozen=True)
class Reading:
    dialogues: int
    mean_tokens: int
    longest_tokens: int
    source: str
    """Where the numbers come from, in words."""

    @property
    def tokens(self) -> int:
        return self.dialogues * self.mean_tokens

    @property
    def rows(self) -> int:
        """Supervised ones."""
        return int(SUPERVISED * self.tokens)


def expected_reading(config: TrainConfig) -> Reading:
    """Raises UserError when nothing is known about the dialogues."""
    data = config.data
    if data.path.startswith(WORLD):
        count = config.world.train_dialogues * len(config.world.skills)
        return _limited(count, WORLD_TOKENS, WORLD_TOKENS, "the built-in world", config)
    file = Path(data.path)
    if file.is_file():
        try:
            sizes = list(_row_bytes(file))
        except (ValueError, OSError) as error:  # json's and pyarrow's errors are of these kinds
            reason = str(error).splitlines()[0]
            raise UserError(f"{data.path}: cannot be read as {file.suffix.lstrip('.')}: {reason}") from error
        if not sizes:
            raise UserError(f"{data.path}: the file holds no dialogues; it needs one per line or row")
        mean, longest = (int(KEYS_SHARE * size / BYTES_PER_TOKEN) for size in (sum(sizes) / len(sizes), max(sizes)))
        return _limited(
            len(sizes), mean, longest, f"counted in {file.name}, at {BYTES_PER_TOKEN} bytes a token", config
        )
    if data.num_dialogues is None:
        raise UserError(
            f"data.path={data.path}: not a file here, so nobody knows how many dialogues it has; "
            "give data.num_dialogues=NUMBER"
        )
    return _limited(data.num_dialogues, data.max_length, data.max_length, "data.num_dialogues", config)


def _limited(count: int, mean: int, longest: int, source: str, config: TrainConfig) -> Reading:
    data, estimate = config.data, config.estimate
    kept = min(count, data.limit or count) * (1 if data.heldout_path else 1 - data.heldout_fraction)
    return Reading(max(1, round(kept)), _mean(mean, data.max_length, estimate), min(longest, data.max_length), source)


def _mean(mean: int, max_length: int, estimate: EstimateConfig) -> int:
    return max(1, min(estimate.tokens_per_dialogue or mean, max_length))


def _row_bytes(file: Path) -> Iterator[int]:
    """Bytes of every row; Parquet tells only its mean."""
    if file.suffix == ".parquet":
        from pyarrow import parquet

        found = parquet.ParquetFile(file).metadata
        total = sum(found.row_group(place).total_byte_size for place in range(found.num_row_groups))
        yield from (total // max(found.num_rows, 1) for _ in range(found.num_rows))
        return
    with file.open("rb") as opened:
        is_array = file.suffix == ".json" and opened.read(1) == b"["
        opened.seek(0)
        if is_array:
            yield from (len(json.dumps(row)) for row in json.load(opened))
        else:
            yield from (len(line) for line in opened if line.strip())
