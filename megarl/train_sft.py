"""`python -m megarl.train_sft`: supervised fine-tuning of a GPT on text, completions or conversations."""

import sys
from typing import TYPE_CHECKING

from megarl.config.compose import run

if TYPE_CHECKING:
    from megarl.config.schema import SFTConfig
    from megarl.models.exchange.pretrained import Sources
    from megarl.modules.sft import SFT


def build(config: "SFTConfig", sources: "Sources") -> "SFT":
    from megarl.modules.sft import SFT
    from megarl.tokenizers import build_tokenizer

    return SFT(config, build_tokenizer(config.tokenizer.kind, config.tokenizer.path), sources)


def train(config: "SFTConfig") -> int:
    from megarl.modules.fit import fit  # heavy imports only once the configuration is known to be good

    return fit("sft", config, build)


def main() -> None:
    run("sft", sys.argv[1:], train)


if __name__ == "__main__":
    main()
