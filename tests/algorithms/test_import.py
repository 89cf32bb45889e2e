"""What the room of the algorithms may know: torch and the errors, nothing above."""

import subprocess
import sys

FORBIDDEN = ("megatron", "lightning", "transformers", "hydra", "omegaconf")


def test_importing_the_algorithms_brings_in_no_framework() -> None:
    lines = [
        "import sys, megarl.algorithms",
        f"print([name for name in {FORBIDDEN!r} if name in sys.modules])",
    ]
    result = subprocess.run([sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
