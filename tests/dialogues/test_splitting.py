"""Long dialogues are split between turns: every piece fits, nothing is lost, nothing comes twice."""

import pytest
from tiny_models import encoder

from fusion.dialogues.dialogue import Dialogue, Message, chat
from fusion.dialogues.splitting import split_long

ROUNDS = [word for n in range(9) for word in (f"Which river {n}?", "yes, " * (1 + n % 4))]
SYSTEM = Message("system", "Be kind.")


@pytest.mark.parametrize("max_length", [40, 60, 90, 200])
@pytest.mark.parametrize("system", [(), (SYSTEM,)])
def test_every_piece_fits_and_nothing_is_lost(max_length, system):
    chosen = encoder("byte_level", "chatml")
    dialogue = Dialogue((*system, *chat(*ROUNDS).messages), "rivers")
    pieces = split_long([dialogue], chosen, max_length)
    assert len(pieces) > 1
    rest = []
    for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
        assert piece.messages[: len(system)] == system
        own = piece.messages[len(system) :]
        assert (own[0].role, own[-1].role, piece.category) == ("user", "assistant", "rivers")
        single = len(own) == 2
        assert chosen.num_tokens(piece) <= max_length or single
        if after is not None:  # as many rounds as fit
            longer = Dialogue((*piece.messages, *after.messages[len(system) : len(system) + 2]))
            assert chosen.num_tokens(longer) > max_length
        rest += own
    assert tuple(rest) == dialogue.messages[len(system) :]


def test_short_and_unrenderable_dialogues_stay_whole():
    chosen = encoder("metaspace", "gemma")  # whose template refuses system messages
    refused = Dialogue((SYSTEM, *chat(*ROUNDS).messages))
    assert split_long([chat("a", "b"), refused], chosen, 30) == [chat("a", "b"), refused]


def test_a_last_question_stays_with_the_answer_before():
    chosen = encoder("byte_level", "chatml")
    dialogue = Dialogue((*chat(*ROUNDS).messages, Message("user", "and " * 50)))
    pieces = split_long([dialogue], chosen, 60)
    assert [piece.messages[-1].role for piece in pieces] == ["assistant"] * (len(pieces) - 1) + ["user"]
    assert all(any(one.role == "assistant" for one in piece.messages) for piece in pieces)
