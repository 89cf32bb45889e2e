"""The layout that a start with other processes takes: it divides, keeps the batch, and is near the configured one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from megarl.config.elastic import Fit, fitted, nearest_layout, nodes_to_use
from megarl.config.generate import GenerateConfig
from megarl.config.ppo import PPOConfig
from megarl.config.rules import check
from megarl.config.sections.model import EncoderConfig, ExpertsConfig
from megarl.config.sections.rollout import RolloutEngineConfig
from megarl.config.sft import SFTConfig
from megarl.config.world import data_parallel_size, replica_size
from megarl.errors import ConfigError
from tests.refusals import refused


def tree(batch: int = 24, micro: int = 4, *, elastic: bool = True, kind: type = SFTConfig, **parallel: Any) -> Any:
    """A runnable tree with 12 layers of 12 heads, and this batch and layout."""
    config = kind()
    config.data.train = ["train.jsonl"]
    config.model.num_layers, config.model.num_heads, config.model.hidden_size = 12, 12, 48
    config.trainer.global_batch_size, config.trainer.micro_batch_size = batch, micro
    config.launch.elastic = elastic
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    return config


def settings(config: Any, *worlds: int) -> dict[str, Any] | None:
    fit = nearest_layout(config, worlds)
    return None if fit is None else dict(fit.settings)


SIZES = list(itertools.product((1, 2, 4), (1, 2, 3), (None, 2), (12, 24, 30), (1, 4)))


@pytest.mark.parametrize("world", [1, 2, 3, 5, 6, 7, 8, 12, 16, 24])
def test_what_it_finds_satisfies_every_rule_and_keeps_the_batch(world: int) -> None:
    found = 0
    for tp, pp, vpp, batch, micro in SIZES:
        config = tree(batch, micro, tp=tp, pp=pp, vpp=vpp if pp > 1 else None)
        fit = nearest_layout(config, [world])
        if fit is None:
            continue
        found += 1
        taken = fit.applied(config)
        check(taken, world)
        assert replica_size(taken) * data_parallel_size(taken, world) == world
        assert taken.trainer.global_batch_size == batch
        assert taken.trainer.micro_batch_size <= micro
        assert taken.parallel.tp <= tp
        assert fit.share == pytest.approx(tp * pp / (taken.parallel.tp * taken.parallel.pp))
    assert (found == 0) == (world == 7), "nothing here divides by seven"


def test_a_layout_that_divides_is_kept_wherever_it_does() -> None:
    kept = 0
    for (tp, pp, vpp, batch, micro), world in itertools.product(SIZES, range(1, 25)):
        config = tree(batch, micro, tp=tp, pp=pp, vpp=vpp if pp > 1 else None)
        try:
            check(config, world)
        except ConfigError:
            continue
        kept += 1
        assert nearest_layout(config, [world]) == Fit(world, {}, 1)
        assert fitted(config, world) == (config, None)
    assert kept > 100


@pytest.mark.parametrize(
    ("world", "batch", "micro", "parallel", "expected"),
    [
        (2, 12, 4, {}, {"trainer.micro_batch_size": 3}),  # three replicas had 4 of 12 each, two have 6
        (4, 24, 4, {"tp": 4, "pp": 2}, {"parallel.pp": 1}),  # tensor parallelism stays where it can
        (6, 24, 4, {"tp": 4}, {"parallel.tp": 3, "parallel.pp": 2}),  # not less memory for the model
        (2, 24, 4, {"tp": 4}, {"parallel.tp": 2}),  # half of the memory is the most there is
        (3, 24, 4, {"tp": 2}, {"parallel.tp": 1, "parallel.pp": 3}),
        (8, 16, 4, {"pp": 3}, {"parallel.pp": 4}),
        (4, 4, 4, {"pp": 2, "vpp": 3}, {"trainer.micro_batch_size": 1}),  # microbatches come in rounds of two
        (1, 8, 4, {"pp": 2, "vpp": 3}, {"parallel.pp": 1, "parallel.vpp": None}),
    ],
)
def test_it_is_the_nearest(
    world: int, batch: int, micro: int, parallel: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = tree(batch, micro, **parallel)
    fit = nearest_layout(config, [world])
    assert fit is not None
    assert fit.settings == expected


def test_a_smaller_model_per_process_counts_more_than_another_process() -> None:
    config = tree(12, 2, tp=2)
    config.model.num_heads, config.model.num_layers = 4, 4  # three processes can only hold whole models
    assert settings(config, 3) == {"parallel.tp": 1}
    assert nearest_layout(config, [3, 2, 1]) == Fit(2, {}, 1)


def test_experts_are_shared_by_replicas_that_there_are() -> None:
    config = tree(48, 2, ep=4)
    config.model.experts = ExpertsConfig(count=8, ffn_size=48)
    assert settings(config, 4) == {}
    assert settings(config, 8) == {}
    fit = nearest_layout(config, [6])
    assert fit is not None
    assert fit.settings == {"parallel.pp": 3, "parallel.ep": 2}, "no process holds more experts than before"
    assert fit.share == pytest.approx(2 / 3)
    check(fit.applied(config), 6)


def test_context_parallelism_stays() -> None:
    config = tree()
    config.parallel.cp = 2
    assert settings(config, 2, 4, 6) is None or "parallel.cp" not in settings(config, 2, 4, 6)


def test_an_encoder_decoder_is_cut_between_its_parts_only() -> None:
    config = tree(tp=4)
    config.model.encoder, config.model.position = EncoderConfig(num_layers=12), "relative"
    assert settings(config, 6) == {"parallel.tp": 3, "parallel.pp": 2}


def test_of_a_model_whose_shape_is_in_a_file_only_divisors_are_taken() -> None:
    config = tree(tp=4)
    config.model.path = "models/some"
    assert settings(config, 6) == {"parallel.tp": 2}
    assert settings(config, 3) == {"parallel.tp": 1}


def test_a_layout_for_generation_that_does_not_divide_is_left_out() -> None:
    config = tree(24, 2, kind=PPOConfig)
    config.reward.fn = "rewards.py:score"
    config.rollout.engine = RolloutEngineConfig(layout="tp2")
    assert settings(config, 4) == {}
    assert settings(config, 3) == {"rollout.engine.layout": None}
    assert fitted(config, 3)[0].rollout.engine_settings.layout is None
    config.launch.elastic = False
    offers = {"rollout.engine.layout": [None], "launch.elastic": [True]}
    with refused(ConfigError, key="rollout.engine.layout", value="tp2", offers=offers):
        fitted(config, 3)


def test_a_job_uses_as_many_nodes_as_divide() -> None:
    four_layers = tree(16, 4)
    four_layers.model.num_layers = 4
    assert nodes_to_use(four_layers, 3, 1) == 2
    four_layers.launch.elastic = False
    assert nodes_to_use(four_layers, 3, 1) == 3
    assert nodes_to_use(tree(24, 4, tp=4), 3, 4) == 3
    assert nodes_to_use(tree(16, 4, tp=4), 3, 4) == 3, "stages fill the nodes that replicas cannot"
    nothing = tree(16, 4)
    nothing.tokenizer.kind = "sentencepiece"
    assert nodes_to_use(nothing, 3, 1) == 3, "the refusal is of all of them"


# --- what a start does with it ----------------------------------------------------------------------------------------


def test_an_elastic_start_takes_it_and_says_so() -> None:
    config = tree(12, 4, tp=2)
    taken, fit = fitted(config, 1)
    assert fit is not None
    assert (taken.parallel.tp, config.parallel.tp) == (1, 2), "the configuration stays as it is"
    line = fit.told(config)
    for part in ("launch.elastic", "parallel.tp=2", "parallel.tp=1", "trainer.global_batch_size=12", "cluster.gpus=1"):
        assert part in line
    assert "cluster.gpus" not in Fit(2, {"trainer.micro_batch_size": 3}, 1).told(config)


def test_a_start_that_is_not_elastic_is_refused_with_it() -> None:
    offers = {"parallel.tp": [1], "parallel.pp": [3], "launch.elastic": [True]}
    with refused(ConfigError, key="parallel.tp", value=2, offers=offers, names=("parallel.tp=1 parallel.pp=3",)):
        fitted(tree(24, 4, elastic=False, tp=2), 3)
    with refused(ConfigError, key="trainer.global_batch_size", value=12) as found:
        fitted(tree(12, 4, elastic=False), 2)
    assert found.error.offers["trainer.micro_batch_size"] == [3]


def test_processes_that_no_layout_divides_over_are_told_how_many_do() -> None:
    with refused(ConfigError, key="trainer.global_batch_size", value=16) as found:
        fitted(tree(16, 4), 5)
    assert "one does over 4" in str(found.error)


def test_what_is_wrong_with_any_number_of_processes_is_refused_as_ever() -> None:
    with refused(ConfigError, key="parallel.tp", value=5) as found:
        fitted(tree(tp=5), 7)
    assert "launch.elastic" not in found.error.offers
    config = tree(tp=2)
    config.parallel.tp = 0
    with refused(ConfigError, key="parallel.tp", value=0):
        fitted(config, 3)
    config = tree(tp=2)
    config.tokenizer.kind = "sentencepiece"
    with refused(ConfigError, key="parallel.tp", value=2):
        fitted(config, 3)


def test_programs_that_do_not_train_are_refused_as_ever() -> None:
    config = GenerateConfig()
    config.parallel.tp = 2
    with refused(ConfigError, key="parallel.tp", value=2) as found:
        fitted(config, 3)
    assert "launch.elastic" not in found.error.offers


def test_replicas_that_do_not_share_the_experts_evenly_are_refused() -> None:
    config = tree(elastic=False, ep=4)
    config.model.experts = ExpertsConfig(count=8, ffn_size=48)
    with refused(ConfigError, key="parallel.ep", value=4, offers={"parallel.ep": [1, 2]}):
        check(config, 6)


@pytest.mark.parametrize(
    ("batch", "layers", "pp", "nodes", "expected"),
    [
        (48, 48, 1, 3, {}),
        (64, 48, 1, 3, {"parallel.tp": 4, "parallel.pp": 3}),
        (64, 32, 1, 2, {}),
        (64, 32, 4, 2, {"parallel.pp": 2}),
    ],
)
def test_the_examples_of_the_page_on_clusters_are_true(
    batch: int, layers: int, pp: int, nodes: int, expected: dict[str, Any]
) -> None:
    """Four nodes of eight, of which three come back."""
    config = tree(batch, 4, tp=8, pp=pp)
    config.model.num_layers, config.model.num_heads, config.model.hidden_size = layers, 64, 4096
    check(config, 32)
    assert nodes_to_use(config, 3, 8) == nodes
    assert settings(config, 8 * nodes) == expected
