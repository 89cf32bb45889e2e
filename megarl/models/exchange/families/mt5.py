"""mT5: the layers of T5 under other names of its class and its model type."""

from dataclasses import replace

from megarl.models.exchange.families import t5

FAMILY = replace(t5.FAMILY, name="mt5", architectures=("MT5ForConditionalGeneration",), trunk="MT5Model")
