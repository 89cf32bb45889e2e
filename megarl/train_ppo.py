"""`python -m megarl.train_ppo`: proximal policy optimisation of a GPT on prompts and a reward function."""

from megarl.training import command

main = command("ppo")

if __name__ == "__main__":
    main()
