class QuantizedTensor:
    """A name that Megatron asks tensors for; none is one without FP8."""
