"""After distillation: the student to torch.export, to ONNX, and to int8, for the robot.

Nothing of fad_loss is left in a student that was trained with it. Side by side: the size on disk,
the latency of one cloud on one core, and the accuracy of teacher, student and what was exported.
"""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime import quantization
from torch import Tensor, nn

import toy
from plain import train

Run = Callable[[Tensor], Tensor]
CLOUDS = toy.clouds(800)[0]
OPTIONS = {"dynamo": True, "external_data": False, "verbose": False}
SOME = {"points": {0: torch.export.Dim("batch", min=1, max=4096)}}


class Calibration(quantization.CalibrationDataReader):
    """Clouds to measure the ranges of all activations with."""

    def __init__(self) -> None:
        self.rest = iter([{"points": batch.numpy()} for batch in CLOUDS.split(100)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, None at the end."""
        return next(self.rest, None)


def exported(network: nn.Module, path: Path) -> tuple[Path, Run]:
    """A network as a program of `torch.export`, written and read again."""
    torch.export.save(torch.export.export(network, (CLOUDS[:2],), dynamic_shapes=SOME), path)
    return path, torch.export.load(path).module()


def session(path: Path) -> tuple[Path, Run]:
    """What runs an ONNX file on one core."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    run = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run
    return path, lambda points: torch.from_numpy(run(None, {"points": points.numpy()})[0])


@torch.no_grad()
def row(name: str, path: Path, run: Run, test: toy.Clouds) -> None:
    """Print what one form of a network costs and is worth."""
    times = timeit.repeat(lambda: run(test[0][:1]), number=1, repeat=200)
    milliseconds, kilobytes = 1e3 * statistics.median(times), path.stat().st_size / 1e3
    worth = toy.share(run(test[0]), test[1])
    print(
        f"{name:28} {kilobytes:7.1f} kB {milliseconds:7.3f} ms   accuracy {worth:5.1f} %",
        flush=True,
    )


if __name__ == "__main__":
    arguments = toy.start(toy.parser(__doc__))
    folder = arguments.folder
    toy.compare(arguments, train)
    networks = {"teacher": (24, "network"), "with-0": (6, "student")}
    for name, (width, key) in networks.items():
        network = toy.PointNet(width).eval()
        network.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True)[key])
        forms = {"torch.export": exported(network, folder / f"{name}.pt2")}
        path, small = folder / f"{name}.onnx", folder / f"{name}-int8.onnx"
        torch.onnx.export(network, (CLOUDS[:2],), path, dynamic_shapes=SOME, **OPTIONS)
        quantization.quantize_static(path, small, Calibration(), per_channel=True)
        forms |= {"ONNX": session(path), "ONNX, int8": session(small)}
        for form, (path, run) in forms.items():
            row(f"{name}, {form}", path, run, toy.clouds(1600, seed=1))
