"""`python -m megarl.train_ppo`: proximal policy optimisation of a GPT on prompts and a reward function."""

import sys
from typing import TYPE_CHECKING

from megarl.config.compose import run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from megarl.config.schema import PPOConfig
    from megarl.models.exchange.pretrained import Sources


def train(config: "PPOConfig", functions: "Mapping[str, Callable[..., Any]] | None" = None) -> int:
    """`functions` are callables that take the place of those that `reward.fn` and `metric.fn` name."""
    from megarl.modules.fit import fit  # heavy imports only once the configuration is known to be good
    from megarl.modules.ppo import PPO
    from megarl.tokenizers import build_tokenizer

    def build(config: "PPOConfig", sources: "Sources") -> PPO:
        return PPO(config, build_tokenizer(config.tokenizer.kind, config.tokenizer.path), functions, sources)

    return fit("ppo", config, build)


def main() -> None:
    run("ppo", sys.argv[1:], train)


if __name__ == "__main__":
    main()
