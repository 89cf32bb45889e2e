"""`python -m megarl`: the same as the command `megarl`."""

from megarl.cli import main

if __name__ == "__main__":
    main()
