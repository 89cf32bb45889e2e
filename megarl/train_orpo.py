"""`python -m megarl.train_orpo`: Odds-ratio preference optimisation of a GPT on pairs of responses."""

from megarl.training import command

main = command("orpo")

if __name__ == "__main__":
    main()
