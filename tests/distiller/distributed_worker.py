"""What each process of the distributed tests runs: half the batch, the distiller wrapped whole."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fad_loss import Distiller

from .networks import DGCNN, PointNet2, Tuples, clouds

WHOLE = states.StateDictOptions(full_state_dict=True)
# On CPUs PyTorch 2.6 has no FSDP2.
WAYS = ("DDP", "FSDP2") if torch.__version__ >= "2.7" else ("DDP",)
# Each with what makes half a batch, twice, the whole: no statistics of the batch.
OPTIONS = {"normalize": False, "max_points": None, "weight": 0.5, "warmup_steps": 2}
NETWORKS = {
    "DGCNN": (lambda width: DGCNN(width, norm=False), {"conv5": "conv5"}),
    "PointNet++": (PointNet2, {"sa1[1]": "sa1[1]", "sa2[1]": "sa2[1]"}),
    "tuples": (Tuples, {"[features]": "[features]"}),
}


def build(name: str, **more) -> Distiller:
    make, layers = NETWORKS[name]
    torch.manual_seed(3)
    student, teacher = make(4), make(8)
    layout = "bnc" if name == "tuples" else "bcn"
    return Distiller(student, teacher, layers, example=clouds(), layout=layout, **OPTIONS, **more)


def train(model: nn.Module, points: Tensor) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output, loss = model(points)
        logits = output if isinstance(output, Tensor) else output.logits
        (loss + logits.square().mean()).backward()
        optimizer.step()
    return float(loss.detach())


def work(rank: int, folder: str) -> None:
    """Train every network on this rank's half, and leave the parameters."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    points = clouds()[2 * rank : 2 * rank + 2]
    results = {}
    for name in NETWORKS:
        distiller = build(name)
        train(DistributedDataParallel(distiller), points)
        results[name, "DDP"] = dict(distiller.named_parameters())
        if "FSDP2" not in WAYS:
            continue
        distiller = build(name)
        mesh = init_device_mesh("cpu", (2,))
        for child in distiller.student.children():
            if next(child.parameters(), None) is not None:
                fully_shard(child, mesh=mesh)
        train(fully_shard(distiller, mesh=mesh), points)
        if rank == 0:  # which no other rank is asked for
            distiller.statistics()
        # Saved whole, and loaded in pieces.
        state = states.get_model_state_dict(distiller, options=WHOLE)
        states.set_model_state_dict(distiller, state, options=WHOLE)
        results[name, "FSDP2"] = {
            key: parameter.full_tensor() for key, parameter in distiller.named_parameters()
        }
    for way in ("eager", "compiled"):
        distiller = build("DGCNN", balance=True)
        if way == "compiled":
            distiller.compile(backend="aot_eager", fullgraph=True)
        train(DistributedDataParallel(distiller), points)
        results["share", way] = distiller.state_dict()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
