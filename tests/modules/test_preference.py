"""The losses and metrics of preferences, from log-probs that are given."""

from __future__ import annotations

import pytest
import torch

from megarl.algorithms.preference import CPO_KINDS, DPO_KINDS, SMOOTHED_DPO_KINDS, dpo_loss
from megarl.config.preference import KINDS, SMOOTHED, CPOConfig, CPOSettings, DPOConfig, DPOSettings, ORPOConfig
from megarl.modules.cpo import CPO
from megarl.modules.dpo import DPO
from megarl.modules.orpo import ORPO
from megarl.modules.preference import PairPreference, Responses, with_prompts
from megarl.parallel.rows import Rows


def responses(pairs: int = 5, filler: int = 2) -> Responses:
    generator = torch.Generator().manual_seed(3)
    rows = 2 * (pairs + filler)
    lengths = torch.randint(1, 9, (rows,), generator=generator).float()
    logprobs = -3 * lengths * torch.rand(rows, generator=generator)
    present = torch.arange(rows) < 2 * pairs
    return Responses(
        logprobs=torch.where(present, logprobs, 0),
        reference=torch.where(present, logprobs + torch.randn(rows, generator=generator), 0),
        lengths=torch.where(present, lengths, 1),
        present=present,
        cross_entropy=torch.where(present, -logprobs, 0),
    )


def swapped(given: Responses) -> Responses:
    order = torch.arange(len(given.logprobs)).view(-1, 2).flip(1).flatten()
    return Responses(**{name: value[order] for name, value in vars(given).items() if value is not None})


def modules() -> list[PairPreference]:
    kinds = [DPO(DPOConfig(dpo=DPOSettings(kind=kind))) for kind in ("sigmoid", "ipo", "hinge", "apo_zero")]
    return [*kinds, ORPO(ORPOConfig()), CPO(CPOConfig()), CPO(CPOConfig(cpo=CPOSettings(kind="simpo")))]


@pytest.mark.parametrize("module", modules(), ids=lambda module: type(module).__name__)
def test_swapping_the_responses_mirrors_accuracy_and_margin(module: PairPreference) -> None:
    given = module.measure_responses(responses())
    other = module.measure_responses(swapped(responses()))
    assert float(given["accuracy"]) + float(other["accuracy"]) == pytest.approx(5)
    assert float(given["margin"]) == pytest.approx(-float(other["margin"]), abs=1e-6)
    assert float(given["reward_chosen"]) == pytest.approx(float(other["reward_rejected"]))


@pytest.mark.parametrize("module", modules(), ids=lambda module: type(module).__name__)
def test_filler_rows_count_for_nothing(module: PairPreference) -> None:
    padded = module.measure_responses(responses(filler=3))
    real = slice(0, 10)
    alone = module.measure_responses(
        Responses(**{name: value[real] for name, value in vars(responses(filler=3)).items() if value is not None})
    )
    for name, value in alone.items():
        torch.testing.assert_close(padded[name], value)


def test_kinds_are_mixed_by_weight_and_ipo_takes_means() -> None:
    given = responses(filler=0)
    mixed = DPO(DPOConfig(dpo=DPOSettings(mix={"sigmoid": 0.75, "ipo": 0.25}))).pair_losses(given)
    sums = [value[start::2] for value in (given.logprobs, given.reference) for start in (0, 1)]
    means = [(value / given.lengths)[start::2] for value in (given.logprobs, given.reference) for start in (0, 1)]
    torch.testing.assert_close(mixed, 0.75 * dpo_loss(*sums, 0.1) + 0.25 * dpo_loss(*means, 0.1, "ipo"))


def test_the_cross_entropy_is_a_mean_over_tokens_and_has_its_weight() -> None:
    module = DPO(DPOConfig(dpo=DPOSettings(sft_coef=0.5)))
    sums, counts = module.measure_responses(responses()), {"units": 5.0, "tokens": 20.0}
    without = DPO(DPOConfig()).total_loss(sums, counts)
    assert float(module.total_loss(sums, counts) - without) == pytest.approx(0.5 * float(sums["nll"]) / 20)


def test_the_preferred_rows_of_orpo_train_on_the_prompt_too() -> None:
    mask = torch.tensor([[0.0, 0, 1, 1, 0], [0, 0, 1, 1, 1]])
    rows = Rows(torch.ones(2, 5, dtype=torch.long), torch.tensor([4, 5]), mask)
    found = with_prompts(rows, {"responses": mask})
    assert found.action_mask.tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert torch.equal(found["responses"], mask)


def test_the_configurations_offer_the_kinds_that_exist() -> None:
    assert set(KINDS) == set(DPO_KINDS)
    assert set(SMOOTHED) == set(SMOOTHED_DPO_KINDS)
    choices = CPOSettings.__dataclass_fields__["kind"].metadata["choices"]
    assert set(choices) == {*CPO_KINDS, "simpo"}
