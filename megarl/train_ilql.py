"""`python -m megarl.train_ilql`: a GPT learns from samples with rewards, without generating any while it trains."""

import sys
from typing import TYPE_CHECKING

from megarl.config.compose import run

if TYPE_CHECKING:
    from megarl.config.schema import ILQLConfig
    from megarl.modules.ilql import ILQL


def build(config: "ILQLConfig") -> "ILQL":
    from megarl.modules.ilql import ILQL
    from megarl.tokenizers import build_tokenizer

    return ILQL(config, build_tokenizer(config.tokenizer.kind, config.tokenizer.path))


def train(config: "ILQLConfig") -> int:
    from megarl.modules.fit import fit  # heavy imports only once the configuration is known to be good

    return fit("ilql", config, build)


def main() -> None:
    run("ilql", sys.argv[1:], train)


if __name__ == "__main__":
    main()
