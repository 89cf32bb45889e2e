"""`python -m megarl.train_sft`: supervised fine-tuning of a GPT on text, completions or conversations."""

from megarl.training import command

main = command("sft")

if __name__ == "__main__":
    main()
