"""Saving behind training: the state is copied to host memory, and a thread writes it from there."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


def save(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None) -> "Future[Any]":
    """Start to write this rank's part of the state; the future is done once all of it is written.

    The writer copies nothing ahead: in its thread that would open the node's first GPU on every
    rank. torch's own stager is named because a writer that is given would stage itself, with every
    tensor copied twice.
    """
    stager = DefaultStager(StagingOptions(False, False, False, False))
    writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)
    future = dcp.async_save(state, storage_writer=writer, process_group=group, async_stager=stager)
    assert isinstance(future, Future)
    future.add_done_callback(lambda _: stager.close())
    return future
