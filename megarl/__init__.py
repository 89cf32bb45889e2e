"""megarl trains large GPT models with reinforcement learning over Megatron-core."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megarl.api import Trained, default_config, train
    from megarl.session import Session

__version__ = "0.2.0"
__all__ = ["Session", "Trained", "__version__", "default_config", "train"]


def __getattr__(name: str) -> Any:
    """The Python interface, imported when it is asked for: `import megarl` stays cheap."""
    if name in ("Trained", "default_config", "train"):
        from megarl import api

        return getattr(api, name)
    if name == "Session":
        from megarl.session import Session

        return Session
    if name == "logging":
        import importlib

        return importlib.import_module("megarl.logging")
    raise AttributeError(f"module 'megarl' has no attribute {name!r}")
