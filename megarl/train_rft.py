"""`python -m megarl.train_rft`: rejection-sampling fine-tuning of a GPT on prompts and a reward function."""

import sys
from typing import TYPE_CHECKING

from megarl.config.compose import run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from megarl.config.schema import RFTConfig
    from megarl.models.exchange.pretrained import Sources


def train(config: "RFTConfig", functions: "Mapping[str, Callable[..., Any]] | None" = None) -> int:
    """`functions` are callables that take the place of those that `reward.fn` and `metric.fn` name."""
    from megarl.modules.fit import fit  # heavy imports only once the configuration is known to be good
    from megarl.modules.rft import RFT
    from megarl.tokenizers import build_tokenizer

    def build(config: "RFTConfig", sources: "Sources") -> RFT:
        return RFT(config, build_tokenizer(config.tokenizer.kind, config.tokenizer.path), functions, sources)

    return fit("rft", config, build)


def main() -> None:
    run("rft", sys.argv[1:], train)


if __name__ == "__main__":
    main()
