class DelayedScaling:
    """A name that Megatron subclasses."""
