"""`python -m megarl.train_ilql`: a GPT learns from samples with rewards, without generating any while it trains."""

from megarl.training import command

main = command("ilql")

if __name__ == "__main__":
    main()
