"""A prompt pipeline of one's own: a class whose objects give prompts by index, with the fields that rewards read."""


class Sums:
    """The sums of two numbers below `below`."""

    def __init__(self, below: int = 4) -> None:
        self.pairs = [(one, other) for one in range(below) for other in range(below)]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, str]:
        one, other = self.pairs[index]
        return {"prompt": f"{one}+{other}=", "answer": str(one + other)}
