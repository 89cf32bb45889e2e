"""What runs import or make at their first use, for the process that the worker processes are copies of."""

import megarl.data.build
import megarl.modules.dpo
import megarl.modules.ilql
import megarl.modules.ppo
import megarl.modules.rm
import megarl.modules.sft
import megarl.report.page
import megarl.report.write
import megarl.run.runner
import megarl.run.trainer  # noqa: F401
from megarl.config.compose import compose

compose("sft", [])  # Hydra finds its plugins and reads its grammar once
