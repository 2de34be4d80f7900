"""Several processes of one launch, by `torchrun` or `accelerate launch`: who they are, and what they must agree on.

Started alone, a process is the first of one, and nothing here does anything. Evaluation needs none of this: processes that
ask for one record share its batches through the store, under torchrun or not. Training does.
"""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import InputError, ResourceError

_PATIENCE = datetime.timedelta(hours=12)  # processes meet at the next training only, and one may have much to do until then


def start() -> None:
    """Join the other processes, if the environment names any (RANK, WORLD_SIZE, MASTER_ADDR, ...); a second call does nothing.

    With CUDA each process takes the GPU of its LOCAL_RANK. Raises ResourceError where the machine has fewer GPUs, or the
    others cannot be reached.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if not world.isdigit() or int(world) <= 1 or dist.is_initialized():
        return
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")
    if on_gpu:
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise ResourceError(f"process {local} of this machine has no GPU of its own, there are {there}: start as many")
        torch.cuda.set_device(local)
    try:
        # gloo beside nccl: what is agreed on lies on the CPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ResourceError(f"the {world} processes of this launch do not find each other: {error}") from error


def stop() -> None:
    """Leave the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all are here."""
    agreed(True)  # over gloo: nccl's own needs a GPU


def agreed(value: bool) -> bool:
    """What the first process says; all must ask."""
    if size() == 1:
        return value
    told = torch.tensor([int(value)])
    dist.broadcast(told, 0)
    return bool(told.item())


def rows(n: int) -> list[int]:
    """Which of a batch's n rows are this process's: every `size()`-th. InputError where some process would have none."""
    if n < size():
        raise InputError(f"a batch of {n} cannot be shared by {size()} processes: start fewer, or take a larger batch")
    return list(range(rank(), n, size()))


def total(value: Tensor) -> Tensor:
    """The sum over all processes; no gradient passes. The same tensor where there is one process."""
    if size() == 1:
        return value
    summed = value.detach().clone()
    dist.all_reduce(summed)
    return summed


def gathered(mine: Tensor, n: int) -> Tensor:
    """[len(rows(n)), ..] of each process as [n, ..] of all, in the batch's order."""
    if size() == 1:
        return mine
    most = -(-n // size())
    padded = torch.cat((mine, mine.new_zeros(most - len(mine), *mine.shape[1:])))
    parts = [torch.empty_like(padded) for _ in range(size())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:n]


def mean_and_std(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n - 1) over the first dimension of [n, d], all processes' rows taken together."""
    if size() == 1:
        return sample.mean(0), sample.std(0)
    n = total(torch.tensor(float(len(sample)), device=sample.device, dtype=torch.float64))
    mean = total(sample.double().sum(0)) / n
    squares = total((sample.double() - mean).square().sum(0))
    return mean.to(sample.dtype), (squares / (n - 1)).sqrt().to(sample.dtype)


def as_shared(module: torch.nn.Module) -> Any:
    """The module under torch's DistributedDataParallel (gradients averaged over processes), itself where there is one."""
    return torch.nn.parallel.DistributedDataParallel(module) if size() > 1 else module
