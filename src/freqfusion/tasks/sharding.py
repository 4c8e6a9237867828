"""Training with parameters, gradients and optimizer states in shards over all processes."""

from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from freqfusion.models.base import Model
from freqfusion.models.library import LibraryModel

LEAST_SHARD = 500_000
"""Parameters from which on a part of the network is gathered and freed by itself."""


class FSDP(ModelParallelStrategy):
    """Fully sharded data parallelism (PyTorch's FSDP2): ``--trainer.strategy freqfusion.tasks.FSDP``.

    Checkpoints hold the whole weights and optimizer states in one file, like those of a single process.

    Args:
        process_group_backend: ``"nccl"`` or ``"gloo"``; by default what the devices take.
        timeout: how long processes wait for each other.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta = timedelta(minutes=30)
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """All processes share the parameters, whatever the number of machines."""
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read plain data only, whatever the trainer says."""
        return super().load_checkpoint(checkpoint_path, weights_only=True)


def shard(network: Model, mesh: DeviceMesh) -> None:
    """Put a network's parameters into shards, in place; its parts of many parameters by themselves.

    Args:
        network: called as a whole in each step.
        mesh: of the processes.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    uncalled = [*network.bypassed, network]
    left: dict[nn.Module, int] = {}
    """Parameters that are in no shard yet."""
    for module in [*network.modules()][::-1]:  # children before what holds them
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        left[module] = own + sum(left[child] for child in module.children())
        called = not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and module not in uncalled
        if called and left[module] >= LEAST_SHARD:
            fully_shard(module, mesh=mesh)
            left[module] = 0
    fully_shard(network, mesh=mesh)
    if isinstance(network, LibraryModel):  # whose methods call its host, not its own forward
        for method in ("loss", "find"):
            if hasattr(network, method):
                register_fsdp_forward_method(network, method)
