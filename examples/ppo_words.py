"""PPO with a lambda as reward: answers with more letters. Random weights and a minute on a CPU, to see it work.

python examples/ppo_words.py
"""

import megarl


def main() -> None:
    config = megarl.default_config("ppo", "trainer.max_phases=20", "trainer.eval_every=5", "rollout.max_new_tokens=16")
    config.ppo.rollouts = 64
    config.ppo.kl_coef = 0.0
    config.optim.lr = 2e-3  # the default is for weights that have learned
    config.trainer.global_batch_size = 32
    config.trainer.micro_batch_size = 32
    trained = megarl.train(
        {"num_layers": 2, "hidden_size": 64, "num_heads": 4},
        reward_fn=lambda outputs, **_: [float(sum(map(str.isalpha, output))) for output in outputs],
        prompts=["cats ", "dogs ", "birds "],
        eval_prompts=["fish "],
        config=config,
    )
    scores = [round(row["rollout/score"], 2) for row in trained.history if "rollout/score" in row]
    print("mean score of every phase:", scores)
    print(trained.generate(["cats "], max_new_tokens=16))


if __name__ == "__main__":
    main()
