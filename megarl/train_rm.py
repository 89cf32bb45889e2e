"""`python -m megarl.train_rm`: Training of a reward model on judged responses."""

from megarl.training import command

main = command("rm")

if __name__ == "__main__":
    main()
