"""What a person sees: plain lines in a log file, a bar on a terminal, nothing when it is not wanted."""

import re
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console
from stage1_settings import settings

from fusion.config.schema import TrainerConfig
from fusion.training import progress
from fusion.training.data import FusionDataModule
from fusion.training.fit import fit


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_pivot, tiny_source):
    module = FusionDataModule(settings(tmp_path_factory.mktemp("fit"), tiny_pivot, tiny_source))
    module.setup()
    return module


def trained(data, **changes):
    module = FusionDataModule(replace(data.config, trainer=TrainerConfig(batch_size=4, **changes)))
    module.prepared = data.prepared
    return module, fit(module.config, module, [])


def test_a_log_file_gets_a_line_every_few_steps_and_one_at_the_end(data, capsys):
    module, fitted = trained(data, epochs=2, log_every_steps=3, peak_tflops=0.001)
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert told.out == ""
    total = module.total_steps
    assert [int(re.match(r"step (\d+)/", line)[1]) for line in lines] == sorted({*range(3, total + 1, 3), total})
    assert lines[-1].startswith(f"step {total}/{total}, 0:00:00 left: ")
    for line in lines:
        assert re.search(r"loss \d+\.\d{4} \(CE \d+\.\d{4}, fusion \d+\.\d{4}\)", line)
        assert re.search(r"[\d,]+ tokens/s \([\d,]+ supervised\), MFU \d+\.\d%", line)
        assert re.search(r"lr \S+, gradient norm \d\S*, peak \d+\.\d\d GiB, won by ", line)
    assert f"loss {fitted.metrics['train/loss']:.4f}" in lines[-1]
    assert f"gradient norm {fitted.metrics['train/grad_norm']:.3g}" in lines[-1]


def test_a_line_says_who_won_the_dialogues_of_its_step(data, capsys):
    module, _ = trained(data, epochs=1, log_every_steps=1)
    store, lines = data.prepared.fused, capsys.readouterr().err.splitlines()
    assert len(lines) == module.total_steps
    for step, line in enumerate(lines):
        winners = [store.winners[store.examples[int(number)]] for number in module.plan.step(step)]
        shares = [f"{name} {winners.count(name) / len(winners):.0%}" for name in sorted(set(winners))]
        assert line.endswith(f"won by {' '.join(shares)}")


@pytest.fixture
def screen(monkeypatch):
    """A terminal, whatever the tests themselves are shown on."""
    terminal = Console(file=StringIO(), force_terminal=True, width=220, _environ={"TERM": "xterm"})
    monkeypatch.setattr(progress, "Console", lambda file: terminal)
    return terminal


def test_a_terminal_gets_a_bar_with_the_same_numbers(data, screen):
    module, fitted = trained(data, epochs=1, log_every_steps=1)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())
    assert f"{module.total_steps}/{module.total_steps}" in shown
    assert "━" in shown
    assert f"loss {fitted.metrics['train/loss']:.4f}" in shown
    assert "won by" in shown
    assert "left:" not in shown  # no plain lines beside the bar


def test_the_terminal_is_whole_again_after_an_error(data, screen, monkeypatch):
    def fail(*_):
        raise RuntimeError("told by the step")

    monkeypatch.setattr("fusion.training.student.Student.forward", fail)
    with pytest.raises(RuntimeError, match="told by the step"):
        trained(data, epochs=1)
    assert screen.file.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is shown


def test_nothing_is_shown_when_it_is_not_wanted(data, capsys):
    trained(data, epochs=1, log_every_steps=1, progress_bar=False)
    told = capsys.readouterr()
    assert told.err == told.out == ""
