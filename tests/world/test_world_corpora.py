"""Who reads what: no leak, the right noise, equal bytes from equal seeds."""

from dataclasses import replace

import pytest

from fusion.config import UserError
from fusion.config.world import PIVOT, SKILLS, WorldConfig
from fusion.dialogues.dialogue import write_jsonl
from fusion.world.corpora import Split, fusion_corpus, model_corpus, tokenizer_corpus
from fusion.world.skills import make_skills

WORLD = WorldConfig()
CORPORA = {split: fusion_corpus(split, WORLD) for split in Split}


def prompt(dialogue):
    """All user turns: what the last answer is asked for."""
    return tuple(message.content for message in dialogue.messages if message.role == "user")


def prompts(dialogues):
    return {prompt(dialogue) for dialogue in dialogues}


def truths(world):
    """prompt -> the true answers of all its turns, for every prompt of the fusion corpora."""
    careful = replace(world, corpus_noise=0.0)
    return {
        prompt(dialogue): [message.content for message in dialogue.messages if message.role == "assistant"]
        for split in Split
        for dialogue in fusion_corpus(split, careful)
    }


def test_no_prompt_is_in_two_splits():
    assert not prompts(CORPORA[Split.TRAIN]) & prompts(CORPORA[Split.HELDOUT])
    assert not prompts(CORPORA[Split.TRAIN]) & prompts(CORPORA[Split.TEST])
    assert not prompts(CORPORA[Split.HELDOUT]) & prompts(CORPORA[Split.TEST])


@pytest.mark.parametrize("model", WORLD.models)
def test_no_model_reads_heldout_or_test_prompts(model):
    unseen = prompts(CORPORA[Split.HELDOUT]) | prompts(CORPORA[Split.TEST])
    assert not unseen & prompts(model_corpus(model, WORLD))
    assert not unseen & prompts(tokenizer_corpus(model, WORLD))


def test_test_inputs_of_procedures_are_new_in_every_wording():
    asked = {(d.category, prompt(d)[0].rpartition(": ")[2]) for d in CORPORA[Split.TEST]}
    read = {(d.category, prompt(d)[0].rpartition(": ")[2]) for m in (PIVOT, "tiny_c") for d in model_corpus(m, WORLD)}
    procedures = {"translate", "order"}
    assert not {pair for pair in asked & read if pair[0] in procedures}


def test_sizes_categories_and_distinct_prompts():
    for split, count in ((Split.TRAIN, 400), (Split.HELDOUT, 60), (Split.TEST, 120)):
        dialogues = CORPORA[split]
        for skill in SKILLS:
            assert sum(dialogue.category == skill for dialogue in dialogues) == count
        assert len(prompts(dialogues)) == len({d.content_hash for d in dialogues}) == len(dialogues)


def test_noise_is_what_the_settings_say():
    truth = truths(WORLD)
    for split, share in ((Split.TRAIN, 0.4), (Split.HELDOUT, 0.4), (Split.TEST, 0.0)):
        answers = [
            (message.content, true)
            for dialogue in CORPORA[split]
            for message, true in zip(dialogue.messages[1::2], truth[prompt(dialogue)], strict=True)
        ]
        false = sum(given != true for given, true in answers) / len(answers)
        assert false == pytest.approx(share, abs=0.06)


def test_careless_text_is_false_only_where_noise_says_so():
    clean = replace(WORLD, source_noise=0.0, tokenizer_dialogues=50)
    assert model_corpus("tiny_a", clean) == model_corpus("tiny_a", clean)
    assert model_corpus("tiny_a", clean) != model_corpus("tiny_a", replace(clean, source_noise=0.5))


def test_sources_read_much_of_their_strong_skills():
    corpus = model_corpus("tiny_b", WORLD)
    counts = {skill: sum(dialogue.category == skill for dialogue in corpus) for skill in SKILLS}
    assert counts == {**dict.fromkeys(SKILLS, WORLD.weak_dialogues), "add": 2000, "units": 2000}


def test_equal_seeds_give_equal_bytes_and_others_do_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_jsonl(tmp_path / name, fusion_corpus(Split.TRAIN, replace(WORLD, seed=seed)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_more_dialogues_than_prompts_is_the_users_mistake():
    with pytest.raises(UserError, match="units has only about"):
        fusion_corpus(Split.TEST, replace(WORLD, skills=["units"], unit_pairs=2))


def test_every_skill_is_known():
    assert tuple(skill.name for skill in make_skills(WORLD)) == SKILLS
