"""`python -m megarl.train_grpo`: PPO of a GPT with groups of responses in the place of a critic."""

from megarl.training import command

main = command("grpo")

if __name__ == "__main__":
    main()
