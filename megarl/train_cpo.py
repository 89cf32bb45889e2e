"""`python -m megarl.train_cpo`: Contrastive preference optimisation of a GPT on pairs of responses, and SimPO."""

from megarl.training import command

main = command("cpo")

if __name__ == "__main__":
    main()
