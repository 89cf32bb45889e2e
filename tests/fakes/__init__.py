"""Folders that stand in for packages that need CUDA, to be put on the path of processes that import Megatron.

They have the signatures of Transformer Engine 2.11 and 2.17, and of Apex, for as much as Megatron imports of them, and
compute on the CPU. An argument that the real ones do not know, or a tensor that they would refuse, is refused here too.
Megatron's own wrappers run over them, so that megarl's calls of these wrappers are checked.
"""

from pathlib import Path

WITH_TE = str(Path(__file__).parent / "with_te")
WITH_APEX = str(Path(__file__).parent / "with_apex")
