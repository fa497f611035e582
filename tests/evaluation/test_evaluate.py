"""`evaluate.py` as a user runs it: models, runs over seeds, a judge, mistakes, what it leaves on the disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chat_server import KEY, KEY_VARIABLE, chat_server, files_with
from waiting import PATIENCE

from fusion.config import UserError
from fusion.config.evaluate import EvaluateConfig
from fusion.config.schema import DataConfig, PathsConfig
from fusion.evaluation.choosing import unique_names
from fusion.evaluation.entries import find_entries

REPOSITORY = Path(__file__).resolve().parents[2]
QUESTIONS = [
    {"question_id": 81 + number, "category": "writing", "turns": [f"say {word}", "and <b>now</b>?"]}
    for number, word in enumerate(("river", "wire", "pole", "yes"))
]


def run(folder, *arguments, code=0, **environment):
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "evaluate.py"), *arguments],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def dialogues(path, words=("river", "wire", "pole", "yes", "no")):
    rows = [
        {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]}
        for word in words
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_judged_evaluation_end_to_end(tiny_pivot, tiny_source, tmp_path):
    """Two models, four questions, a judge with a key that fails now and then: scores, answers, a page, no key."""
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))

    def judge(payload):
        text = payload["messages"][-1]["content"]
        return f"It is <i>fair</i>. [[{1 + len(text) % 10}]]"

    with chat_server(judge, faults=[500, "malformed", 429], key=KEY) as server:
        arguments = [
            f"models=[{tiny_pivot.path},{tiny_source.path}]",
            "scorers=[mt_bench,heldout]",
            "seeds=[0,1]",
            "mt_bench.questions=question.jsonl",
            "generation.max_new_tokens=8",
            "data=jsonl",
            f"data.path={dialogues(tmp_path / 'mine.jsonl')}",
            f"judge.base_url={server.base_url}",
            "judge.model=tester",
            f"judge.key_variable={KEY_VARIABLE}",
            "judge.first_wait_s=0.01",
        ]
        output = run(tmp_path, *arguments, "hydra.run.dir=out", **{KEY_VARIABLE: KEY})
        asked = len(server.payloads)
        again = run(tmp_path, *arguments, "hydra.run.dir=again", **{KEY_VARIABLE: KEY})
        assert len(server.payloads) == asked
    out = tmp_path / "out"
    names = [Path(model.path).name for model in (tiny_pivot, tiny_source)]
    assert "## mt_bench" in output
    assert "## heldout" in output
    assert "Not comparable with published numbers: the judge is tester" in output
    assert "32 from the cache, $0.00" in again
    scores = json.loads((out / "scores.json").read_text())
    assert [model["model"] for model in scores["mt_bench"]["models"]] == names
    assert scores["mt_bench"]["models"][0]["facts"]["judge"] == "tester"
    assert (out / "evaluation.md").read_text() == (tmp_path / "again" / "evaluation.md").read_text()
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert {(one["scorer"], one["seed"]) for one in items} == {("mt_bench", 0), ("mt_bench", 1), ("heldout", 0)}
    for name in names:
        answers = [json.loads(line) for line in (out / name / "answers.jsonl").read_text().splitlines()]
        verdicts = (out / name / "judgments.jsonl").read_text().splitlines()
        assert (len(answers), len(verdicts)) == (8, 16)
        assert answers[0]["questions"] == QUESTIONS[0]["turns"]
    page = (out / "answers.html").read_text()
    assert "say river" in page
    assert "<b>now" not in page  # what models and questions say is text, never markup
    assert all(name in page for name in names)
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["judge"]["asked"] == 32
    assert result["judge"]["repeated"] == 3
    assert files_with(KEY, tmp_path) == []
    assert KEY not in output + again


def test_mistakes_are_told_at_once(tmp_path):
    output = run(tmp_path, "models=[/nowhere]", "scorers=[skils,mt_bench]", "seeds=[1,1]", code=2)
    assert "4 problems" in output
    assert "skils is not a scorer; choose from skills" in output
    assert "a judge is needed" in output
    assert "Traceback" not in output
    output = run(tmp_path, "scorers=[mt_bench]", f"models=[{tmp_path}]", "judge=openai", code=2, OPENAI_API_KEY="")
    assert "environment variable OPENAI_API_KEY is not set" in output


def record_run(folder, seed, models, data):
    """A finished run of merge.py, as far as the evaluation reads it."""
    folder.mkdir(parents=True)
    rows = [
        {"model": name, "kind": kind, "strategy": "", "seed": seed, "path": path, "scores": {"average": 0.5}}
        | {"nll_per_byte": 0.1}
        for kind, name, path in models
    ]
    result = {"status": "finished", "seed": seed, "time": seed, "comparison": rows}
    (folder / "result.json").write_text(json.dumps(result))
    lineage = {"stage1": {"a": {"data": vars(data)}}}
    (folder / "lineage.json").write_text(json.dumps(lineage))


@pytest.fixture
def runs(tmp_path, tiny_pivot, tiny_source):
    for seed in (1, 2):
        data = DataConfig("mine", "", heldout_path=dialogues(tmp_path / f"held{seed}.jsonl"))
        models = [("pivot", "pivot", tiny_pivot.path), ("merged", "sce", tiny_source.path)]
        record_run(tmp_path / "runs" / f"seed{seed}", seed, models, data)
    return tmp_path / "runs"


def test_runs_bring_their_models_seeds_and_dialogues(runs, tmp_path):
    entries = find_entries(EvaluateConfig(runs=[str(runs)]))
    assert [entry.name for entry in entries] == ["pivot", "merged sce"]
    assert [[one.seeds for one in entry.repetitions] for entry in entries] == [[(1,), (2,)]] * 2
    assert [one.data.heldout_path for one in entries[1].repetitions] == [
        str(tmp_path / f"held{seed}.jsonl") for seed in (1, 2)
    ]


def test_the_newest_run_is_the_default(runs):
    (first, _) = find_entries(EvaluateConfig(paths=PathsConfig(runs=str(runs))))
    assert [one.seeds for one in first.repetitions] == [(2,)]


def test_runs_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_entries(EvaluateConfig(runs=[str(tmp_path / "nowhere")]))
    with pytest.raises(UserError, match="there is no finished run"):
        find_entries(EvaluateConfig(paths=PathsConfig(runs=str(tmp_path))))


def test_p_values_over_seeds_and_items(runs, tmp_path):
    output = run(tmp_path, f"runs=[{runs}]", "scorers=[heldout]", "hydra.run.dir=out")
    assert "merged sce against pivot" in output
    (pair,) = json.loads((tmp_path / "out" / "scores.json").read_text())["heldout"]["pairs"]
    assert pair["result"]["num_seeds"] == 2
    assert 0 <= pair["result"]["p_value"] <= pair["adjusted"] <= 1


@pytest.fixture
def targets(tmp_path, tiny_pivot):
    """Runs of two seeds with a pivot and two targets: b is better on held-out dialogues of seed 1, a on its test."""
    rows = {
        (1, "a"): (0.2, 0.7),
        (1, "b"): (0.1, 0.6),
        (2, "a"): (0.1, 0.6),
        (2, "b"): (0.1, 0.6),
    }
    for seed in (1, 2):
        data = DataConfig("mine", "", heldout_path=dialogues(tmp_path / f"held{seed}.jsonl"))
        models = [("pivot", "pivot", tiny_pivot.path)]
        for name in "ab":
            folder = tmp_path / f"{name}{seed}"
            folder.mkdir()
            models.append(("target", name, str(folder)))
        run_folder = tmp_path / "runs" / f"seed{seed}"
        record_run(run_folder, seed, models, data)
        result = json.loads((run_folder / "result.json").read_text())
        for row in result["comparison"][1:]:
            row["nll_per_byte"], row["scores"]["average"] = rows[seed, row["model"]]
        (run_folder / "result.json").write_text(json.dumps(result))
    return tmp_path / "runs"


def chosen(runs, *only):
    """Names of the table's lines, each with the folders of its seeds."""
    entries = find_entries(EvaluateConfig(runs=[str(runs)], only=list(only)))
    return {entry.name: [Path(one.model.path).name for one in entry.repetitions] for entry in entries}


def test_models_are_chosen_by_kind_and_name_in_order(targets):
    assert list(chosen(targets)) == ["pivot", "target a", "target b"]
    assert list(chosen(targets, "target b", "pivot", "target")) == ["target b", "pivot", "target a"]


def test_the_best_target_is_chosen_on_held_out_dialogues(targets):
    assert chosen(targets, "best_target") == {"best target": ["b1", "a2"]}
    assert chosen(targets, "best_target_of_test") == {"best target of test": ["a1", "a2"]}


def test_the_best_that_a_search_found_is_chosen_by_its_value(runs, tmp_path):
    with pytest.raises(UserError, match="best_found is chosen by a value that none"):
        chosen(runs, "best_found")
    for seed, values in ((1, (0.3, 0.2)), (2, (0.1, 0.4))):
        folder = runs / f"seed{seed}"
        result = json.loads((folder / "result.json").read_text())
        pivot, merge = result["comparison"]
        trials = []
        for number, value in enumerate(values):
            path = tmp_path / f"trial{number}_{seed}"
            path.mkdir()
            trials.append({**merge, "path": str(path), "search_value": value, "parameters": {"weight": value}})
        result["comparison"] = [pivot, *trials]
        (folder / "result.json").write_text(json.dumps(result))
    assert chosen(runs, "best_found") == {"best found": ["trial1_1", "trial0_2"]}


def test_models_that_are_not_there_are_named(targets):
    with pytest.raises(UserError, match="'targte a'; there are target a, target b") as caught:
        chosen(targets, "targte a", "merged sce", "pivot")
    assert len(caught.value.problems) == 2


def test_planned_pairs_of_chosen_models(runs, tmp_path):
    arguments = [f"runs=[{runs}]", "scorers=[heldout]", "only=[merged,pivot]", "pairs=next", "hydra.run.dir=out"]
    assert "pivot against merged sce" in run(tmp_path, *arguments)
    output = run(tmp_path, "models=[/a]", "only=[pivot]", "pairs=some", code=2)
    assert "models and only: give one of the two" in output
    assert "pairs=some" in output


def test_unique_names():
    assert unique_names(["a", "b", "a"]) == ["a_1", "b", "a_2"]


def test_no_world_is_built_for_scorers_that_read_no_dialogues(tmp_path):
    config = EvaluateConfig(models=["/a"], scorers=["mt_bench"], data=DataConfig(), paths=PathsConfig(cache="nowhere"))
    ((only,),) = [entry.repetitions for entry in find_entries(config)]
    assert only.data.path == ""


def test_every_missing_file_and_model_is_told_before_anything_is_scored(tiny_pivot, tmp_path):
    output = run(
        tmp_path,
        f"models=[{tiny_pivot.path},/nowhere,/no/where/else]",
        "scorers=[heldout,mt_bench,alpaca_eval]",
        "data=jsonl",
        "data.path=mine.jsonl",
        "judge=local",
        "mt_bench.questions=question.jsonl",
        "mt_bench.prompts=prompts.jsonl",
        "alpaca_eval.questions=baseline.json",
        code=2,
    )
    assert "6 problems" in output
    for told in (
        "models[1]=/nowhere",
        "models[2]=",
        "data.path=mine",
        "mt_bench.questions=",
        "alpaca_eval.questions=",
    ):
        assert told in output
    assert "done, seeds" not in output


def test_every_unusable_file_and_model_is_told_before_anything_is_scored(tiny_pivot, tmp_path):
    """Files that are there and wrong: the scorers' all at once, then the models' all at once."""
    (tmp_path / "bad.jsonl").write_text('{"question_id": 1}\n')
    (tmp_path / "bad.json").write_text('{"a": 1}')
    arguments = [
        "scorers=[mt_bench,alpaca_eval]",
        "judge=local",
        "judge.base_url=localhost:1",
        "alpaca_eval.gamed=''",
        "generation.base_url=http://user:secret@localhost/v1",
    ]
    wrong = ["mt_bench.questions=bad.jsonl", "alpaca_eval.questions=bad.json"]
    output = run(tmp_path, f"models=[{tiny_pivot.path}]", *arguments, *wrong, code=2)
    assert "4 problems" in output
    assert "judge.base_url='localhost:1'" in output
    assert "generation.base_url must hold no key" in output
    assert "bad.json: a JSON list" in output
    assert "secret" not in output
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    scored = ["scorers=[heldout]", "data=jsonl", f"data.path={dialogues(tmp_path / 'mine.jsonl')}"]
    output = run(tmp_path, f"models=[{tiny_pivot.path},one,two]", *scored, code=2)
    assert "2 problems" in output
    assert "done, seeds" not in output
    assert "scorers=[]: name one or more" in run(tmp_path, f"models=[{tiny_pivot.path}]", "scorers=[]", code=2)


def test_folders_that_cannot_be_made(tiny_pivot, tmp_path):
    (tmp_path / "file").touch()
    scored = ["scorers=[heldout]", "data=jsonl", f"data.path={dialogues(tmp_path / 'mine.jsonl')}"]
    for place in ("hydra.run.dir=file", "hydra.run.dir=file/out", "paths.cache=file"):
        output = run(tmp_path, f"models=[{tiny_pivot.path}]", *scored, place, code=2)
        assert "name folders that can be written" in output
        assert "Traceback" not in output


def test_a_seed_whose_model_is_gone_is_told(runs, caplog):
    file = runs / "seed2" / "result.json"
    result = json.loads(file.read_text())
    result["comparison"][1]["path"] = "/nowhere"
    file.write_text(json.dumps(result))
    (pivot, merged) = find_entries(EvaluateConfig(runs=[str(runs)]))
    assert [one.seeds for one in pivot.repetitions] == [(1,), (2,)]
    assert [one.seeds for one in merged.repetitions] == [(1,)]
    assert "merged sce: seed 2 is left out: there is no model at /nowhere" in caplog.text


def test_runs_are_compared_by_what_their_dialogues_say(runs, tmp_path, tiny_pivot):
    """Copies of a file and other training dialogues are no difference; other held-out dialogues are one."""
    copy = DataConfig("other", "train.jsonl", heldout_path=dialogues(tmp_path / "copy.jsonl"))
    record_run(runs / "copy", 1, [("target", "a", tiny_pivot.path)], copy)
    assert len(find_entries(EvaluateConfig(runs=[str(runs)]))) == 3
    dialogues(tmp_path / "copy.jsonl", words=("river", "wire"))
    with pytest.raises(UserError, match="other test or held-out dialogues than another run of seed 1"):
        find_entries(EvaluateConfig(runs=[str(runs)]))
