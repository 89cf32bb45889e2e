from contextlib import nullcontext
from typing import Any


class FP8GlobalStateManager:
    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return False


def fp8_autocast(enabled: bool = True, **_: Any) -> nullcontext[None]:
    assert not enabled, "there is no FP8 on a CPU"
    return nullcontext()


def fp8_model_init(enabled: bool = True, **_: Any) -> nullcontext[None]:
    assert not enabled, "there is no FP8 on a CPU"
    return nullcontext()
