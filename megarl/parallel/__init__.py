"""The layout of ranks, process groups, engines and vocab-parallel maths: everything that touches Megatron's state."""

import warnings

# Megatron says at import, module by module, that Transformer Engine and Apex are optional and absent.
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|APEX).*", category=UserWarning)
