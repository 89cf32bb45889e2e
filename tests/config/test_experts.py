"""What a mixture of experts cannot have is refused by key and value, with what it could have."""

from __future__ import annotations

from typing import Any

import pytest

from megarl.config.ppo import PPOConfig
from megarl.config.rules import check
from megarl.config.sections.adapter import AdapterConfig
from megarl.config.sections.model import EncoderConfig, ExpertsConfig
from megarl.config.sections.reward import RewardCallsConfig
from megarl.config.sections.rollout import RolloutEngineConfig
from megarl.config.sft import SFTConfig
from megarl.errors import ConfigError
from tests.refusals import refused

KEY = "model.experts"
CASES: list[tuple[dict[str, Any], dict[str, Any], str, Any, dict[str, Any]]] = [
    ({}, {}, f"{KEY}.count", None, {f"{KEY}.count": [8], KEY: [None]}),
    ({"count": 4, "chosen": 5}, {}, f"{KEY}.chosen", 5, {f"{KEY}.chosen": [4]}),
    ({"count": 4, "chosen": 1}, {}, f"{KEY}.chosen", 1, {f"{KEY}.normalise": [False], f"{KEY}.chosen": [2]}),
    ({"count": 4}, {"mlp_bias": True}, "model.mlp_bias", True, {"model.mlp_bias": [False], KEY: [None]}),
    ({"count": 4, "dense_layers": [0, 4]}, {}, f"{KEY}.dense_layers", 4, {f"{KEY}.dense_layers": [[0]]}),
    (
        {"count": 4, "dense_layers": [0, 1, 2, 3]},
        {},
        f"{KEY}.dense_layers",
        [0, 1, 2, 3],
        {f"{KEY}.dense_layers": [[]], KEY: [None]},
    ),
]


def tree(experts: dict[str, Any] | None, **model: Any) -> SFTConfig:
    config = SFTConfig()
    config.data.train = ["x"]
    config.model.experts = None if experts is None else ExpertsConfig(**experts)
    for name, value in model.items():
        setattr(config.model, name, value)
    return config


@pytest.mark.parametrize(("experts", "model", "key", "value", "offers"), CASES, ids=lambda case: str(case)[:40])
def test_a_shape_that_contradicts_itself_is_refused(
    experts: dict[str, Any], model: dict[str, Any], key: str, value: Any, offers: dict[str, Any]
) -> None:
    with refused(ConfigError, key=key, value=value, offers=offers):
        check(tree(experts, **model), 1)


def test_an_encoder_has_no_experts() -> None:
    config = tree({"count": 4}, position="relative", encoder=EncoderConfig(num_layers=4))
    with refused(ConfigError, key="model.encoder", offers={KEY: [None]}):
        check(config, 1)


def test_shared_experts_divide_and_exist() -> None:
    check(tree({"count": 4}), 1)
    config = tree({"count": 6})
    config.parallel.ep, config.trainer.devices = 4, 4
    offers = {"parallel.ep": [1, 2, 3, 6], f"{KEY}.count": [4, 8]}
    with refused(ConfigError, key="parallel.ep", value=4, offers=offers):
        check(config, 4)
    config = tree(None)
    config.parallel.ep, config.trainer.devices = 2, 2
    with refused(ConfigError, key="parallel.ep", value=2, offers={"parallel.ep": [1]}):
        check(config, 2)


def test_the_width_of_a_plain_mlp_divides_where_a_layer_has_one() -> None:
    for dense, is_fine in (([], True), ([1], False)):
        config = tree({"count": 4, "ffn_size": 8, "dense_layers": dense}, ffn_size=9)
        config.parallel.tp, config.trainer.devices = 2, 2
        if is_fine:
            check(config, 2)
            continue
        with refused(ConfigError, key="parallel.tp", value=2):
            check(config, 2)


def of_ppo(experts: dict[str, Any] | None, **engine: Any) -> PPOConfig:
    config = PPOConfig()
    config.data.train, config.reward.fn = ["x"], "rewards.py:score"
    config.model.experts = None if experts is None else ExpertsConfig(**experts)
    config.rollout.engine = RolloutEngineConfig(**engine)
    return config


@pytest.mark.parametrize(
    ("experts", "engine", "key", "value"),
    [
        ({"count": 4}, {"cuda_graphs": True}, "rollout.engine.cuda_graphs", False),
        (None, {"router_replay": True}, "rollout.engine.router_replay", False),
        ({"count": 4}, {"layout": "tp2"}, "rollout.engine.layout", None),
        ({"count": 4}, {"layout": "two"}, "rollout.engine.layout", None),
    ],
    ids=["graphs", "routes without experts", "experts moved", "no layout"],
)
def test_what_generation_cannot_do_with_experts_is_refused_before_anything_is_built(
    experts: dict[str, Any] | None, engine: dict[str, Any], key: str, value: Any
) -> None:
    config = of_ppo(experts, **engine)
    config.parallel.ep, config.trainer.devices = 2 if experts else 1, 2
    with refused(ConfigError, key=key, offers={key: [value]}):
        check(config, 2)


def test_shared_experts_generate_in_the_layout_that_trains() -> None:
    config = of_ppo({"count": 4}, layout="tp2", router_replay=True)
    config.parallel.ep, config.parallel.tp, config.trainer.devices = 2, 2, 4
    config.reward.calls = RewardCallsConfig(timeout=10, retries=0)
    check(config, 4)


def test_experts_are_not_quantised() -> None:
    config = tree({"count": 4})
    config.adapter = AdapterConfig(rank=4, base_bits=4)
    with refused(ConfigError, key="adapter.base_bits", value=4, offers={"adapter.base_bits": [16]}):
        check(config, 1)
    config.model.experts = None
    check(config, 1)


def test_an_encoder_decoders_sequences_are_not_split() -> None:
    config = tree(None, position="relative", encoder=EncoderConfig(num_layers=4, start_id=0))
    config.parallel.cp, config.trainer.devices = 2, 2
    with refused(ConfigError, key="parallel.cp", value=2, offers={"parallel.cp": [1]}):
        check(config, 2)
