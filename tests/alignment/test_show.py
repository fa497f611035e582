"""`python -m fusion.alignment.show`: two tokenisations of one text over each other."""

import pytest

from fusion.alignment.show import main


@pytest.fixture
def folders(pivot, source, tmp_path):
    names = [str(tmp_path / name) for name in ("pivot", "source")]
    for tokenizer, name in zip((pivot, source), names, strict=True):
        tokenizer.save_pretrained(name)
    return names


def test_both_sides_and_their_relations_are_drawn(folders, capsys):
    assert main([*folders, "--text", "The ratio of poles 北京"]) in (0, None)
    assert "1-1" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_the_users_mistake(folders, tmp_path, capsys):
    try:
        status = main([folders[0], str(tmp_path / "none"), "--text", "The ratio"])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert "none" in capsys.readouterr().err
