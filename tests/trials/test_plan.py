"""The command line of a sweep, its file, and what is refused."""

from pathlib import Path

import pytest

from megarl.errors import ConfigError
from megarl.trials.plan import make_search, read
from megarl.trials.search import BayesianSearch, GridSearch, Hyperband
from megarl.trials.spaces import Space
from tests.refusals import refused

LR = "sweep.optim.lr=loguniform(1e-5,1e-3)"
METRIC = "sweep.metric=eval/loss"


def test_keys_of_the_sweep_of_the_runs_and_spaces_are_told_apart() -> None:
    plan = read(["sft", "model.num_layers=2", LR, "sweep.seed=choice(1,2)", METRIC, "sweep.at_once=2", "--"])
    assert plan.settings == ["model.num_layers=2"]
    assert plan.spaces == [Space("optim.lr", "loguniform", low=1e-5, high=1e-3), Space("seed", "choice", ("1", "2"))]
    assert (plan.metric, plan.config.at_once, plan.lower_is_better) == ("eval/loss", 2, True)


def test_a_file_holds_the_same_and_the_command_line_replaces_it(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "metric: eval/score\nkind: bayesian\ntrials: 5\nsearch:\n  optim.lr: loguniform(1e-5, 1e-3)\n"
        "  seed: [1, 2]\nsettings:\n  model:\n    num_layers: 2\n  data.train: [a.jsonl, 'my data.jsonl']\n"
    )
    plan = read(["ppo", f"sweep.file={file}", "sweep.trials=7", "optim.eps=1e-6"])
    assert plan.settings == ["model.num_layers=2", "data.train=[a.jsonl,'my data.jsonl']", "optim.eps=1e-6"]
    assert [space.key for space in plan.spaces] == ["optim.lr", "seed"]
    assert plan.spaces[1].choices == ("1", "2")
    assert plan.config.trials == 7
    assert isinstance(make_search(plan), BayesianSearch)
    assert not plan.lower_is_better


def test_hyperband_takes_phases_or_steps_up_to_what_the_run_has() -> None:
    for algorithm, key in (("ppo", "trainer.max_phases"), ("sft", "trainer.max_steps")):
        plan = read([algorithm, LR, METRIC, "sweep.kind=hyperband", "sweep.trials=9"])
        assert plan.budget_key == key
        search = make_search(plan, 90)
        assert isinstance(search, Hyperband)
        assert search.rungs == [[(9, 10), (3, 30), (1, 90)]]


def test_a_grid_counts_itself() -> None:
    search = make_search(read(["sft", LR, "sweep.seed=choice(1,2)", METRIC, "sweep.kind=grid"]))
    assert isinstance(search, GridSearch)
    assert search.trials == 6


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        ([], "ALGORITHM"),
        (["stf"], "ALGORITHM"),
        (["sft", LR], "sweep.metric"),
        (["sft", METRIC], "sweep"),
        (["sft", METRIC, "sweep.optim.rl=choice(1,2)"], "optim.rl"),
        (["sft", METRIC, "sweep.optim.lr=1e-3"], "sweep.optim.lr"),
        (["sft", METRIC, "sweep.trails=3"], "sweep.trails"),
        (["sft", METRIC, LR, "sweep.trials=0"], "sweep.trials"),
        (["sft", METRIC, LR, "sweep.kind=gird"], "sweep.kind"),
        (["sft", METRIC, LR, "optim.lr=1"], "optim.lr"),
        (["sft", METRIC, LR, "run.dir=a"], "run.dir"),
        (["sft", METRIC, LR, "optm.eps=1"], "optm.eps"),
        (["sft", METRIC, LR, "sweep.backend=ray", "sweep.launcher=a"], "sweep.launcher"),
        (["sft", METRIC, "sweep.kind=hyperband", "sweep.trainer.max_steps=int(1,2)"], "trainer.max_steps"),
        (["sft", METRIC, LR, "sweep.file=none.yaml"], "sweep.file"),
    ],
)
def test_what_cannot_be_a_sweep_is_refused_with_its_key(argv: list[str], key: str) -> None:
    with refused(ConfigError, key=key):
        read(argv)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("- 1\n", "sweep.file"),
        ("{", "sweep.file"),
        ("metirc: a\n", "metirc"),
        ("search: 3\n", "search"),
        ("3: 4\n", "sweep.file"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(content: str, key: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(content)
    with refused(ConfigError, key=key):
        read(["sft", f"sweep.file={file}", METRIC, LR])
