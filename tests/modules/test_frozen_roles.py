"""A model that only evaluates beside the policy: no checkpoint holds it, and no restore changes it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megarl.checkpoint import find
from megarl.config.compose import compose
from megarl.models.roles import Role
from megarl.modules.sft import SFT
from megarl.run.runner import run_training
from megarl.tokenizers import build_tokenizer
from tests.e2e.runs import SMALL, assert_same_bits, final_tensors, launched
from tests.worlds import Worlds

QUICK = ["checkpoint.save_last=true", "checkpoint.best.keep=0", "optim.schedule=constant", "optim.warmup_steps=0"]


class WithFrozen(SFT):
    """SFT beside a frozen model of the same shape, with weights that follow from `frozen_seed`."""

    frozen_seed = 7

    def configure_model(self) -> None:
        if self.engines:
            return
        super().configure_model()
        frozen = Role("reward", self.config.model, self.vocab_size, heads=("lm", "value"))
        self.engines["reward"] = self.build(frozen, seed=self.frozen_seed)
        self.built = self.frozen()

    def frozen(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.engines["reward"].parameters()}


def run_with_frozen(run_dir: Path, steps: int, frozen_seed: int, *settings: str) -> bool:
    """Whether the frozen model has the weights after the run that it was built with."""
    built: list[WithFrozen] = []

    def build(config: object, sources: object) -> WithFrozen:
        built.append(WithFrozen(config, build_tokenizer("bytes", None), sources=sources))  # type: ignore[arg-type]
        built[0].frozen_seed = frozen_seed
        return built[0]

    with launched():
        config, _ = compose("sft", [*SMALL, *QUICK, f"run.dir={run_dir}", f"trainer.max_steps={steps}", *settings])
        assert run_training("sft", config, build) == 0
    (module,) = built
    assert not any(parameter.requires_grad for _, parameter in module.engines["reward"].parameters())
    after = module.frozen()
    return all(torch.equal(after[name], tensor) for name, tensor in module.built.items())


@pytest.mark.parametrize(("world", "layout"), [(1, []), (2, ["parallel.pp=2"])], ids=["TP1", "PP2"])
def test_a_frozen_role_is_in_no_checkpoint_and_a_resume_leaves_it(
    world: int, layout: list[str], worlds: Worlds, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    worlds.run(world, run_with_frozen, whole, 4, 7, *layout)
    worlds.run(world, run_with_frozen, cut, 2, 7, *layout)
    assert not [name for name in final_tensors(cut) if not name.startswith("policy.")]
    kept = worlds.run(world, run_with_frozen, cut, 4, 8, *layout)  # other weights than in the first half
    assert kept == [True] * world
    assert find(cut / "checkpoints")[-1].name == find(whole / "checkpoints")[-1].name
    assert_same_bits(final_tensors(cut), final_tensors(whole))
