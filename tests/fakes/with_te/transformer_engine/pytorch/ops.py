class FusibleOperation:
    """A name in Megatron's annotations."""


class Sequential:
    """A name in Megatron's annotations."""
