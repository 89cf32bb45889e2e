"""`python -m megarl.train_ppo`: proximal policy optimisation of a GPT on prompts and a reward function."""

import sys
from typing import TYPE_CHECKING

from megarl.config.compose import run

if TYPE_CHECKING:
    from megarl.config.schema import PPOConfig
    from megarl.modules.ppo import PPO


def build(config: "PPOConfig") -> "PPO":
    from megarl.modules.ppo import PPO
    from megarl.tokenizers import build_tokenizer

    return PPO(config, build_tokenizer(config.tokenizer.kind, config.tokenizer.path))


def train(config: "PPOConfig") -> int:
    from megarl.modules.fit import fit  # heavy imports only once the configuration is known to be good

    return fit("ppo", config, build)


def main() -> None:
    run("ppo", sys.argv[1:], train)


if __name__ == "__main__":
    main()
