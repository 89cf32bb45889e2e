"""`python -m megarl.train_rft`: rejection-sampling fine-tuning of a GPT on prompts and a reward function."""

from megarl.training import command

main = command("rft")

if __name__ == "__main__":
    main()
