"""The processes of one training run under torchrun, one a GPU: who they are, and how they share a model (FSDP2).

Every parameter is cut into `world_size` shards. A layer's are gathered before it runs and freed behind it, gradients are
summed in float32 and cut again (PyTorch's `fully_shard`). One process is the special case of one shard.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from jetlab.models.surgery import Slot, decoder

TIMEOUT = timedelta(
    minutes=30
)  # loading a model from shared storage can keep one process that much longer than another


@dataclass(frozen=True)
class Ranks:
    """This process among all: its `rank` of `world_size`, and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a tensor over all processes, on each."""
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.SUM)
        return x / self.world_size

    def wait(self) -> None:
        """Until every process is here."""
        dist.barrier()

    def of_first(self, x: object) -> object:
        """What the first process gives, on each; behind it all have arrived."""
        held = [x]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def gathered(self, x: object) -> list:
        """What every process gives, in order, on each."""
        found = [None] * self.world_size
        dist.all_gather_object(found, x)
        return found


@contextmanager
def started(device: str) -> Iterator[Ranks]:
    """The group of processes that torchrun began, gloo on "cpu" and NCCL on "cuda"; it ends with the block.

    Raises RuntimeError outside torchrun, and if there are more processes on this machine than GPUs.
    """
    if "RANK" not in os.environ:
        raise RuntimeError(
            "jetlab.train.main runs under torchrun, which numbers its processes, but RANK is not set; start it as "
            "`torchrun --standalone --nproc-per-node 1 -m jetlab.train.main JOB`"
        )
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise RuntimeError(
                f"each process needs a GPU of its own, got process {local + 1} of {os.environ['LOCAL_WORLD_SIZE']} here and "
                f"{torch.cuda.device_count()} GPUs; lower text.n_processes"
            )
        torch.cuda.set_device(local)
        here = torch.device("cuda", local)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=here)
    else:
        here = torch.device("cpu")
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        yield Ranks(dist.get_rank(), dist.get_world_size(), here, mesh)
    finally:
        dist.destroy_process_group()


def shard(root: nn.Module, models: list[PreTrainedModel], ranks: Ranks, *, precision: str, recompute: bool) -> None:
    """Cut `root`, which holds `models`, into shards: each linear path, then each layer, then what is left. In place.

    Linear paths are units of their own, so that one can be called outside its layer, and an idle one is never gathered.
    `precision` "bfloat16": products in bfloat16; weights, sums of gradients and the optimiser stay float32. `recompute`:
    a layer's activations are computed again in the backward pass instead of kept. `root`'s forward must do all the work.
    """
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for model in models:
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for layer in decoder(model).layers:
            if isinstance(layer.self_attn, Slot):
                for path in layer.self_attn.linear.values():
                    fully_shard(path, mesh=ranks.mesh, mp_policy=policy)
            fully_shard(layer, mesh=ranks.mesh, mp_policy=policy)
    fully_shard(root, mesh=ranks.mesh, mp_policy=policy)
