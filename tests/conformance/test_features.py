"""The cases of the suite: every feature, every pair, what each needs, and what it is compared with."""

from itertools import combinations

import pytest

from megarl.conformance.features import BY_KEY, FEATURES, MODEL, Case, cases


def test_each_feature_and_each_pair_is_one_case() -> None:
    found = [frozenset(case.keys) for case in cases()]
    keys = [feature.key for feature in FEATURES]
    assert len(keys) == len(set(keys)) == 13
    assert len(found) == len(set(found)) == 13 + 78
    assert set(found) == {frozenset(pair) for pair in combinations(keys, 2)} | {frozenset({key}) for key in keys}


def test_cases_can_be_limited_to_some_features() -> None:
    assert [case.name for case in cases(("cp", "tp"))] == ["tp", "cp", "tp+cp"]


@pytest.mark.parametrize(
    ("keys", "world", "settings"),
    [
        ((), 1, {}),
        (("tp",), 2, {"parallel.tp": 2}),
        (("sp",), 2, {"parallel.tp": 2, "parallel.sequence_parallel": True}),
        (("pp", "vpp"), 2, {"parallel.pp": 2, "parallel.vpp": 2}),
        (("sp", "vpp"), 4, {"parallel.tp": 2, "parallel.pp": 2, "parallel.vpp": 2}),
        (("dp",), 2, {}),
        (("ep",), 2, {"parallel.ep": 2, "model.experts.count": 4}),
        (("dp", "ep"), 4, {"parallel.ep": 2}),
        (("tp", "ep"), 4, {"parallel.tp": 2, "parallel.ep": 2}),
        (("cp", "tied"), 2, {"parallel.cp": 2, "model.tie_embeddings": True}),
        (("freeze", "pack"), 1, {"model.num_layers_unfrozen": 2, "ppo.pack": True}),
    ],
)
def test_a_case_has_what_its_features_need(keys: tuple[str, ...], world: int, settings: dict[str, object]) -> None:
    case = Case(keys)
    assert case.world == world
    assert settings.items() <= case.settings.items()
    assert MODEL.items() <= case.settings.items()


def test_a_reference_is_the_same_model_without_a_layout() -> None:
    reference = Case(("tp", "ep")).reference
    assert reference.name == "ep"
    assert {key.split(".")[0] for key in reference.settings} == {"model"}
    assert reference.settings["model.experts.count"] == 4
    assert Case(("cut", "pack")).reference.name == Case(("pp", "recompute")).reference.name == "plain"
    assert Case(("adapter", "tied")).reference.settings["adapter.rank"] == BY_KEY["adapter"].settings["adapter.rank"]


def test_what_is_its_own_reference_starts_like_a_simpler_model() -> None:
    own = [case for case in cases() if case.is_its_reference]
    assert {case.name for case in own} == {
        "freeze", "adapter", "tied", "freeze+adapter", "freeze+tied", "adapter+tied",
    }  # fmt: skip
    assert {case.started_from.name for case in own} == {"plain", "tied"}
