"""`python -m megarl.train_dpo`: Direct preference optimisation of a GPT on pairs of responses."""

from megarl.training import command

main = command("dpo")

if __name__ == "__main__":
    main()
