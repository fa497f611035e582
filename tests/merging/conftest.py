from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from merge_inputs import make_family, save_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, list[Path]]:
    """Folders of a base (with tokeniser files) and three targets, bfloat16."""
    base, targets = make_family(dtype=torch.bfloat16)
    folder = save_model(tmp_path / "base", base)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text("{}")
    (folder / "README.md").write_text("the base's card")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder, [save_model(tmp_path / f"target{j}", state) for j, state in enumerate(targets)]
