"""`python -m megarl.train_kto`: Kahneman-Tversky optimisation of a GPT on labelled responses."""

from megarl.training import command

main = command("kto")

if __name__ == "__main__":
    main()
