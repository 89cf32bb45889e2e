"""ILQL on a handful of samples with rewards: the values steer what is generated towards the better ones.

python examples/ilql_rewards.py
"""

import megarl


def main() -> None:
    config = megarl.default_config("ilql", "trainer.max_steps=60", "trainer.eval_every=null", "optim.lr=1e-3")
    config.rollout.max_new_tokens = 8
    config.data.cache = None
    config.ilql.target_alpha = 1.0  # so short a run would leave the target heads, which guide, where they started
    trained = megarl.train(
        {"num_layers": 2, "hidden_size": 64, "num_heads": 4},
        samples=[["Which animal? ", "dolphins"], ["Which animal? ", "geese"]] * 8,
        rewards=[1.0, 100.0] * 8,
        config=config,
    )
    for beta in (0.0, 4.0):
        print(f"beta {beta:g}:", trained.generate("Which animal? ", temperature=0.0, ilql_beta=beta))


if __name__ == "__main__":
    main()
