"""The layout of ranks, process groups, engines and vocab-parallel maths: everything that touches Megatron's state."""

import warnings

from megarl.parallel.megatron_versions import refuse_unusable

# Megatron says at import, module by module, that Transformer Engine and Apex are optional and absent.
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|APEX).*", category=UserWarning)
refuse_unusable()  # before any module of this folder imports Megatron, where it would end in a traceback
