"""Planning builds worlds that are not there, which needs a process without a real one."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """No process group, whatever an earlier test of this process has left."""
    if dist.is_initialized():
        dist.destroy_process_group()
    yield
    assert not dist.is_initialized()
