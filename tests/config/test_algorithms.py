"""One declaration is all that the command line, the Python interface and the documents need of an algorithm."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

import megarl
from megarl.config.algorithms import ALGORITHMS, Algorithm, entry_points
from megarl.config.compose import compose, run
from megarl.config.settings import algorithm_of
from megarl.errors import ConfigError
from megarl.inputs import _algorithm
from tests.kin import KIN
from tests.refusals import refused

ROOT = Path(megarl.__file__).resolve().parents[1]
EACH = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=lambda algorithm: algorithm.name)


@pytest.fixture
def kin(monkeypatch: pytest.MonkeyPatch) -> Algorithm:
    monkeypatch.setitem(ALGORITHMS, KIN.name, KIN)
    return KIN


def test_a_declared_default_beats_groups_and_yields_to_presets_and_the_command_line(
    kin: Algorithm, folder: Path, preset: Callable[..., None]
) -> None:
    preset("mine", "rollout: {n: 2}\n")

    def values(*argv: str) -> tuple[int, float, int]:
        config, _ = compose(kin.name, list(argv))
        same = megarl.default_config(kin.name, *argv)
        assert OmegaConf.to_object(same) == config
        return config.rollout.n, config.ppo.gamma, config.model.num_layers

    assert values() == (4, 0.5, 3)
    assert values("model=small") == (4, 0.5, 3)
    assert values("+conf=mine") == (2, 0.5, 3)
    assert values("+conf=mine", "rollout.n=1", "ppo.gamma=0.25") == (1, 0.25, 3)
    assert compose("ppo", [])[0].rollout.n == 1, "the tree that both have is left as it is"


def test_presets_give_an_algorithm_what_they_give_another_of_the_same_tree(kin: Algorithm, folder: Path) -> None:
    own = kin.defaults.keys() - ALGORITHMS["ppo"].defaults.keys()
    for name in ("randomwalks", "dapo", "gpt20b"):
        ours, theirs = (compose(algorithm, [f"+conf={name}"])[1] for algorithm in (kin.name, "ppo"))
        for key in own:
            section, _, last = key.rpartition(".")
            ours[section].pop(last)
            theirs[section].pop(last)
        assert ours == theirs, name


def test_help_says_what_an_algorithm_is_and_its_own_defaults(
    kin: Algorithm, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(kin.name, ["--help", "all"], lambda config: pytest.fail("must not run"))
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert "megarl kin " in out
    assert kin.about in out
    assert "  rollout.n=4  [int]" in out


def test_hydras_own_command_line_has_the_declared_defaults(
    kin: Algorithm, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    with pytest.raises(SystemExit) as ended:
        run(
            kin.name,
            ["--multirun", "+conf=randomwalks", "rollout.n=2,4"],
            lambda config: seen.append((config.rollout.n, config.ppo.gamma)),
        )
    assert (ended.value.code, seen) == (0, [(2, 0.5), (4, 0.5)])


@pytest.mark.parametrize(
    "changed",
    [
        lambda config: config,
        copy.deepcopy,
        lambda config: pickle.loads(pickle.dumps(config)),
        lambda config: OmegaConf.merge(config, {"seed": 2}),
    ],
    ids=["as it is", "copied", "pickled", "merged"],
)
def test_settings_remember_their_algorithm(kin: Algorithm, changed: Callable[..., object]) -> None:
    for name in (kin.name, *("sft", "ppo")):
        assert algorithm_of(changed(megarl.default_config(name))) == name
    config = changed(megarl.default_config(kin.name))
    assert _algorithm(len, None, None, config) == kin.name  # type: ignore[arg-type]
    assert _algorithm(None, None, None, config) == kin.name  # type: ignore[arg-type]
    assert _algorithm(len, None, None, None) == "ppo", "the first that learns from prompts"
    with refused(ConfigError, key="config", value=kin.name, offers={"config": ["sft"]}):
        _algorithm(None, ["a"], None, config)  # type: ignore[arg-type]


def test_settings_of_nobody_are_refused() -> None:
    for config in (OmegaConf.structured(KIN.config()), OmegaConf.create({"ppo": {}}), SimpleNamespace(), KIN.config()):
        assert algorithm_of(config) is None
        with refused(ConfigError, key="config"):
            megarl.train(reward_fn=len, config=config)


@EACH
def test_a_module_is_told_whose_it_is_by_the_table_alone(algorithm: Algorithm) -> None:
    from megarl.modules.base import Module
    from megarl.training import module_of

    module = module_of(algorithm.name)
    assert isinstance(module, type)
    assert issubclass(module, Module)
    assert (module.entry, module.unit) == (Module.entry, Module.unit)
    assert algorithm.unit in ("step", "phase")


ENTRY_POINT = """
from megarl.training import command

main = command("{name}")

if __name__ == "__main__":
    main()
"""
LAUNCHER = """#!/usr/bin/env bash
#SBATCH --job-name=megarl-{name} --exclusive --mem=0 --requeue --open-mode=append --signal=USR1@300
# sbatch --nodes=2 --gpus-per-node=8 launchers/{name}.sh [+conf=PRESET] [key=value ...]; see docs/clusters.md
here=${{0%/*}}; [[ -e $here/shared.sh ]] || here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=||p'); \
until [[ -e $here/shared.sh || $here != */* ]]; do here=${{here%/*}}; done
source "$here/shared.sh" && launch {name} "$@"
"""


@EACH
def test_an_entry_point_and_a_launcher_say_a_name_and_nothing_else(algorithm: Algorithm) -> None:
    entry_point = ROOT / "megarl" / f"{algorithm.program}.py"
    body = ENTRY_POINT.format(name=algorithm.name)
    told = f"make {entry_point}: a docstring, then\n{body}"
    assert entry_point.is_file(), told
    docstring, _, rest = entry_point.read_text(encoding="utf-8").partition("\n")
    assert docstring.startswith(f'"""`python -m megarl.{algorithm.program}`: '), told
    assert rest == body, told
    launcher = ROOT / "launchers" / f"{algorithm.name}.sh"
    script = LAUNCHER.format(name=algorithm.name)
    assert launcher.is_file(), f"make {launcher} (chmod +x):\n{script}"
    assert launcher.read_text(encoding="utf-8") == script
    assert launcher.stat().st_mode & 0o111, f"chmod +x {launcher}"


def test_no_entry_point_launcher_or_script_is_of_an_algorithm_that_is_not_in_the_table() -> None:
    files = {path.stem for path in (ROOT / "megarl").glob("train_*.py")}
    assert files == {algorithm.program for algorithm in ALGORITHMS.values()}
    launchers = {path.stem for path in (ROOT / "launchers").glob("*.sh")} - {"shared", "chain"}
    assert launchers == ALGORITHMS.keys()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    scripts = dict(re.findall(r'^([\w-]+) = "(megarl\.\w+:main)"$', project, flags=re.MULTILINE))
    wanted = {
        f"megarl-{one.program.replace('_', '-')}": f"megarl.{one.program}:main" for one in entry_points().values()
    }
    trained = {name: target for name, target in scripts.items() if target.startswith("megarl.train")}
    missing = [f'{name} = "{target}"' for name, target in (wanted.items() - scripts.items())]
    assert not missing, "add to [project.scripts] in pyproject.toml:\n" + "\n".join(missing)
    assert trained.items() <= wanted.items()


@EACH
def test_the_documents_know_every_algorithm(algorithm: Algorithm) -> None:
    pages = {
        "README.md": f"megarl {algorithm.name}",
        "docs/planning.md": f"`algorithm` | {', '.join(ALGORITHMS)} |",
        "docs/clusters.md": f"`{algorithm.name}.sh`",
    }
    for page, text in pages.items():
        assert text in (ROOT / page).read_text(encoding="utf-8"), f"{page} lacks {text}"
