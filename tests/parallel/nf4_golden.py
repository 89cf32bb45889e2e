"""Write nf4_golden.json with bitsandbytes 0.50.2, which is not a dependency: `pip install bitsandbytes`, then
`python -m tests.parallel.nf4_golden`."""

import json
from pathlib import Path

import torch
from torch import Tensor

GOLDEN = Path(__file__).with_suffix(".json")


def matrix() -> Tensor:
    """A matrix [66, 256] of 264 blocks, so two groups, with an outlier and a row of zeros; exact on every machine."""
    index = torch.arange(66 * 256, dtype=torch.int64)
    values = ((index * index * 7919 + index * 104729) % 65537 - 32768).float().view(66, 256) / 2**20
    values *= torch.arange(1, 67).float()[:, None] / 64
    values[5] = 0
    values[40, 70] = 1.5
    return values


def main() -> None:
    """Quantise the matrix with bitsandbytes and write the packed codes and the dequantised absmax of each block."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(matrix(), blocksize=64, compress_statistics=True, quant_type="nf4")
    dequantised = functional.dequantize_4bit(codes, state)
    golden = {
        "codes": bytes(codes.flatten().tolist()).hex(),
        "absmax_codes": bytes(state.absmax.tolist()).hex(),
        "scales": state.state2.absmax.tolist(),
        "offset": state.offset.item(),
        "absmax": dequantised.view(-1, 64).abs().amax(1).tolist(),
        "first_row": dequantised[0].tolist(),
    }
    GOLDEN.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
