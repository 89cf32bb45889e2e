"""An algorithm that is declared in the table and nowhere else: PPO's tree and module under another name."""

from megarl.config.algorithms import ALGORITHMS, Algorithm

KIN = Algorithm(
    "kin",
    config=ALGORITHMS["ppo"].config,
    module=ALGORITHMS["ppo"].module,
    about="A relative of PPO.",
    learns_from="prompts",
    unit="phase",
    defaults={**ALGORITHMS["ppo"].defaults, "rollout.n": 4, "ppo.gamma": 0.5, "model.num_layers": 3},
)
