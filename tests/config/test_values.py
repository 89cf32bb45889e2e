"""Values of single keys are refused where nothing could be computed with them, whatever their size."""

from __future__ import annotations

import os
from typing import Any

import pytest

from megarl.config.algorithms import entry_point, entry_points
from megarl.config.compose import compose
from megarl.config.findings import FINDINGS
from megarl.config.ilql import ILQLConfig
from megarl.config.leaf import leaves, optional_sections
from megarl.config.offers import divisors
from megarl.config.ppo import PPOConfig
from megarl.config.rules import check
from megarl.config.sections.model import ModelConfig, RopeScalingConfig
from megarl.config.shape import shape_problem
from megarl.config.values import check_values
from megarl.errors import ConfigError
from tests.refusals import assert_refusal, refused

HUGE = 10**40


def with_value(key: str, value: Any, tree: type = PPOConfig) -> Any:
    config = tree()
    *above, name = key.split(".")
    section = config
    for part in above:
        if getattr(section, part) is None:  # an optional section
            kind = next(found.kind for found in optional_sections(tree) if found.key.endswith(part))
            setattr(section, part, kind())
        section = getattr(section, part)
    setattr(section, name, value)
    return config


def assert_refused(key: str, value: Any, tree: type = PPOConfig) -> str:
    """By its key and its value, which may be the wrong one of a list."""
    with refused(ConfigError, key=key, names=(f"{key}=",)) as found:
        check_values(with_value(key, value, tree))
    assert found.error.value is value or found.error.value in value
    return found.line


@pytest.mark.parametrize("entry", entry_points())
def test_every_number_has_bounds(entry: str) -> None:
    """No integer may be as large as one likes, and no number as large, as small, or not a number at all."""
    tree = entry_point(entry).config
    for leaf in leaves(tree):
        kinds = leaf.type.split(" | ")
        bad: list[float] = [HUGE] if "int" in kinds and "str" not in kinds else []
        bad += [float("nan"), float("inf"), -float("inf"), 1e300, 1e-300] if "float" in kinds else []
        for value in bad:
            with refused(ConfigError, key=leaf.key):
                check_values(with_value(leaf.key, value, tree))


@pytest.mark.parametrize("key", ["model.hidden_size", "model.num_layers", "model.max_positions", "ppo.rollouts"])
def test_sizes_that_no_machine_has_are_refused(key: str) -> None:
    assert_refused(key, 99999999999999999999)


def test_a_model_that_nobody_could_hold_is_refused_by_its_parameters() -> None:
    config = PPOConfig()
    config.data.train, config.reward.fn = ["p.jsonl"], "f:f"
    config.model.hidden_size = 2**20
    with refused(ConfigError, key="model.hidden_size", value=2**20, offers={}):
        check(config, 1)


def test_divisors_of_an_absurd_number_are_not_all_searched() -> None:
    assert divisors(24) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert {1, 3, 9} < set(divisors(99999999999999999999))


def test_a_world_of_many_processes_is_offered_its_neighbours_alone() -> None:
    config = PPOConfig()
    config.data.train, config.reward.fn = ["p.jsonl"], "f:f"
    config.trainer.devices, config.parallel.tp = 1023, 4
    with refused(
        ConfigError,
        key="parallel.tp",
        value=4,
        offers={"trainer.devices": [1012, 1016, 1020, 1024], "parallel.tp": [1]},
    ):
        check(config, 1023)


@pytest.mark.parametrize("seed", [2**63, 2**64, 2**70, -1])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    assert_refused("seed", seed)


@pytest.mark.parametrize("value", [1e-40, 1e-20, 1e-5, 0.009, -1.0, float("nan")])
@pytest.mark.parametrize("key", ["rollout.temperature", "eval.sweep.temperature"])
def test_a_temperature_that_cannot_be_drawn_at_is_refused_by_its_own_key(key: str, value: float) -> None:
    assert_refused(key, [value] if key.startswith("eval") else value)


@pytest.mark.parametrize("value", [0.0, 0.01, 1.0])
def test_temperatures_that_can_be_drawn_at_stay(value: float) -> None:
    check_values(with_value("rollout.temperature", value))
    check_values(with_value("eval.sweep.temperature", [value]))


def test_a_swept_weight_is_checked_one_by_one() -> None:
    assert_refused("eval.sweep.beta", [1.0, -1.0], ILQLConfig)


@pytest.mark.parametrize("key", ["rollout.repetition_penalty", "rollout.top_p"])
@pytest.mark.parametrize("value", [1e-40, 1e31])
def test_other_settings_of_draws_stay_within_float32(key: str, value: float) -> None:
    assert_refused(key, value)


@pytest.mark.parametrize("limit", ["99999999:00:00", "1:2:3", "\u0663:00:00", "00:60:00", "", "1e9", "-1:00:00"])
def test_a_time_limit_is_hours_minutes_and_seconds(limit: str) -> None:
    assert_refused("trainer.max_time", limit)


@pytest.mark.parametrize(
    "name", ["/tmp/x", "../../x", "a/b", "..", ".", "", " ", "a\0b", "a\nb", "a\\b", "n" * 300, "\x1b[2J"]
)
def test_a_runs_name_is_no_path(name: str) -> None:
    assert assert_refused("run.name", name).isprintable()


@pytest.mark.parametrize("name", ["mine", "ppo-job12", "a.b_c", "\u00fcber", ".hidden"])
def test_names_of_runs(name: str) -> None:
    check_values(with_value("run.name", name))


def test_a_runs_name_from_the_environment_is_no_path_either() -> None:
    with refused(ConfigError, key="run.name", value=os.environ["HOME"]):
        compose("sft", ["run.name=${oc.env:HOME}"])


@pytest.mark.parametrize("devices", [0, -1, 100_000, HUGE, "two", "", {"num_layers": 1}, [1], 1.5])
def test_processes_per_node_are_a_sensible_count(devices: Any) -> None:
    assert_refused("trainer.devices", devices)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_layers": "two"}, "model.num_layers"),
        ({"hidden_size": 32.5}, "model.hidden_size"),
        ({"num_kv_heads": 3}, "model.num_kv_heads"),
        ({"tie_embeddings": 1}, "model.tie_embeddings"),
        ({"norm_eps": float("nan")}, "model.norm_eps"),
        ({"position": "learnt"}, "model.position"),
        ({"num_layers": 10**9}, "model.num_layers"),
        ({"num_heads": True}, "model.num_heads"),
        ({"rope_scaling": RopeScalingConfig("linear", "two")}, "model.rope_scaling.factor"),  # type: ignore[arg-type]
        ({"rope_scaling": RopeScalingConfig("other")}, "model.rope_scaling.kind"),
        ({"rope_scaling": RopeScalingConfig("yarn", 2.0)}, "model.rope_scaling.original_positions"),
    ],
)
def test_a_shape_from_a_file_is_checked_in_type_range_and_arithmetic(changes: dict[str, Any], key: str) -> None:
    assert shape_problem(ModelConfig()) is None
    problem = shape_problem(ModelConfig(**changes))
    assert problem is not None
    assert_refusal(problem, key=key)


def test_addresses_that_are_none_are_refused_by_their_key() -> None:
    for url in ("127.0.0.1:8000", "ftp://a", "http://", "http://a:x", "http://u:p@a", "http://a?b=c", "'http://a b'"):
        with refused(ConfigError, key="reward.url"):
            compose("ppo", [f"reward.url=[{url}]"])
    config, _ = compose("ppo", ["reward.url=[http://127.0.0.1:8000,https://rewards.example/a/]"])
    assert config.reward.url == ["http://127.0.0.1:8000", "https://rewards.example/a/"]


def test_a_name_that_is_no_finding_is_refused_with_the_nearest_one_or_with_all() -> None:
    check_values(with_value("health.stop_on", ["score_collapsed", "kl_runaway"]))
    for wrong, offered in (("score_colapsed", ["score_collapsed"]), ("xyz", list(FINDINGS))):
        with refused(ConfigError, key="health.stop_on", value=wrong) as found:
            check_values(with_value("health.stop_on", ["kl_runaway", wrong]))
        assert found.error.offers == {"health.stop_on": offered}
