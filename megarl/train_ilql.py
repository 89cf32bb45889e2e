"""`python -m megarl.train_ilql`: a GPT learns from samples with rewards, without generating any while it trains."""

import sys
from typing import TYPE_CHECKING

from megarl.config.compose import run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from megarl.config.schema import ILQLConfig
    from megarl.models.exchange.pretrained import Sources


def train(config: "ILQLConfig", functions: "Mapping[str, Callable[..., Any]] | None" = None) -> int:
    """`functions` are callables that take the place of those that `reward.fn` and `metric.fn` name."""
    from megarl.modules.fit import fit  # heavy imports only once the configuration is known to be good
    from megarl.modules.ilql import ILQL
    from megarl.tokenizers import build_tokenizer

    def build(config: "ILQLConfig", sources: "Sources") -> ILQL:
        return ILQL(config, build_tokenizer(config.tokenizer.kind, config.tokenizer.path), functions, sources)

    return fit("ilql", config, build)


def main() -> None:
    run("ilql", sys.argv[1:], train)


if __name__ == "__main__":
    main()
