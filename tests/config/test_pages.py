"""The pages that are made from the program say what the program says."""

from mistakes import MISTAKES, PAGE, page

from fusion.config.compose import CONFIG_FOLDER, SCHEMAS
from fusion.config.help import field_sentences
from fusion.config.reference import reference


def test_the_page_of_mistakes_is_up_to_date():
    """`python tests/config/mistakes.py` writes it anew; making it checks that every command ends with 2."""
    assert sum(map(len, MISTAKES.values())) >= 30
    assert page() == PAGE.read_text("utf-8")


def test_the_reference_of_settings_is_up_to_date():
    """`python -m fusion.config.reference > docs/settings.md` writes it anew."""
    assert (PAGE.parent / "settings.md").read_text("utf-8") == reference()


def test_the_reference_leaves_nothing_out():
    text = reference()
    for schema in SCHEMAS.values():
        for name in field_sentences(schema):
            assert f"`{name}`" in text or f"### {name}" in text
    for path in CONFIG_FOLDER.glob("*/*.yaml"):
        if path.parent.name not in ("model", "experiments"):
            assert f"`{path.parent.name}={path.stem}`" in text
