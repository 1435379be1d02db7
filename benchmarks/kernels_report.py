"""What the kernels compile to, for GPUs that need not be there: registers, spills, instructions.

Every kernel of `fad_loss.ops._triton` and every entry of its table of tiles is compiled for sm_80, sm_90
and sm_100, with the arguments that the library itself would pass (recorded from a run on meta tensors),
the heaviest ones: four temperatures with biases, ragged clouds, exclude_self. Results go to a JSON; what
is wrong in it is printed and makes the exit status 1:

- a stack frame (registers spilled to memory), or more shared memory than the GPU has;
- a missing matrix instruction of the target's own: mma (sm_80), wgmma (sm_90), tcgen05 (sm_100);
- no asynchronous copies (cp.async) into the tiles;
- a 32-bit number added to a pointer to a whole tensor.

    python benchmarks/kernels_report.py                       # all, 10 to 20 minutes on 2 cores
    python benchmarks/kernels_report.py --only pull --arch 90  # some
    python benchmarks/kernels_report.py --check                # nothing is compiled: is the JSON current?

An interrupted run continues where it was: entries of unchanged sources are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
REPORT = HERE / "results" / "kernels-report.json"
SOURCES = HERE.parent / "src" / "fad_loss" / "ops" / "_triton"
ARCHITECTURES = (80, 90, 100)
# Shared memory of a block, in KiB.
SHARED = {80: 163, 90: 227, 100: 227}
MATRIX = {80: "mma", 90: "wgmma", 100: "tcgen05"}
INSTRUCTIONS = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "cp.async": r"\bcp\.async\.c[ag]",
    "ex2": r"\bex2\.approx",
}
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# Formats, each with the channels that make a difference: stored in one block, or in several.
FORMATS = {
    "direct": (torch.float32, "highest", (3,)),
    "tf32x3": (torch.float32, "highest", (32, 256)),
    "tf32": (torch.float32, "high", (32, 256)),
    "half": (torch.bfloat16, "high", (64, 256)),
}
KERNELS = ("reduce", "pull", "pull_twice", "scan", "shortlist")


def sources_hash() -> str:
    """A fingerprint of the kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def record(
    kernel: str, dtype: torch.dtype, precision: str, channels: int
) -> list[tuple[Any, dict[str, Any]]]:
    """The launches that the library makes for one problem, without making them."""
    from fad_loss.ops import _triton
    from fad_loss.ops._triton import gradients, kernel_sums, prepare, search, smooth_minimum

    launches: list[tuple[Any, dict[str, Any]]] = []

    def keep(function: Any, _: tuple[int, ...], arguments: dict[str, Any]) -> None:
        launches.append((function, arguments))

    modules = (gradients, kernel_sums, prepare, search, smooth_minimum)
    saved = [module.launch for module in modules]
    before = torch.get_float32_matmul_precision()
    for module in modules:
        module.launch = keep  # type: ignore[assignment]
    torch.set_float32_matmul_precision(precision)
    try:
        x = torch.empty(100_000, channels, dtype=dtype, device="meta")
        values = torch.empty(100_000, 4, device="meta")
        offsets = torch.empty(9, dtype=torch.int64, device="meta")
        clouds = (True, offsets, offsets)
        epsilon = [0.3, 0.5, 0.7, 1.0]
        moves = x.to(torch.float32)
        if kernel == "reduce":
            _triton.softmin(x, x, values, epsilon, *clouds)
        elif kernel == "pull":
            _triton.softmin_backward(
                values, x, x, values, values, epsilon, *clouds, True, True
            )
        elif kernel == "pull_twice":
            _triton.softmin_double_backward(
                moves, moves, values, values, x, x, values, values, epsilon, *clouds
            )
        else:
            _triton.knn(x, x, 1 if kernel == "scan" else 60, *clouds)
    finally:
        torch.set_float32_matmul_precision(before)
        for module, launch in zip(modules, saved, strict=True):
            module.launch = launch
    return launches


def compiled(function: Any, arguments: dict[str, Any], architecture: int) -> Any:
    """Compile a kernel for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    options.setdefault("enable_fp_fusion", True)
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for number, parameter in enumerate(function.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[number,] = [["tt.divisibility", 16]]
        elif isinstance(value, tuple):
            signature[parameter.name] = ("fp32",) * len(value)
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=options)


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and stack of a compiled kernel, as cuobjdump reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


def narrow_offsets(ttir: str) -> int:
    """How many scalar pointers have a 32-bit number added to them.

    Tiles are addressed from a scalar pointer to their first point, by offsets within the tile; the
    scalar one is where a large tensor would overflow.
    """
    return len(re.findall(r"tt\.addptr [^\n]*: !tt\.ptr<\w+>, i32", ttir))


def describe(function: Any, arguments: dict[str, Any], architecture: int) -> dict[str, Any]:
    """Compile, and count."""
    result = compiled(function, arguments, architecture)
    ptx = result.asm["ptx"]
    return {
        **usage(result.asm["cubin"]),
        "shared": result.metadata.shared,
        "instructions": {
            name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()
        },
        "narrow_offsets": narrow_offsets(result.asm["ttir"]),
    }


def problems(entry: dict[str, Any]) -> list[str]:
    """What is wrong with one compiled kernel."""
    wrong = []
    instructions, architecture = entry["instructions"], entry["architecture"]
    if entry["stack"] or entry["local"]:
        wrong.append(f"spills: {entry['stack']} bytes of stack, {entry['local']} of local memory")
    if entry["shared"] > SHARED[architecture] * 1024:
        wrong.append(f"{entry['shared']} bytes of shared memory")
    multiplies = entry["format"] != "direct"
    if multiplies and not instructions[MATRIX[architecture]]:
        wrong.append(f"no {MATRIX[architecture]}")
    # The short list's inner loop keeps tiles of a single block of channels from being pipelined.
    single = entry["channels"] <= entry["tile"]["BLOCK_CHANNELS"]
    if multiplies and not (entry["kernel"] == "shortlist" and single) and not instructions["cp.async"]:
        wrong.append("no cp.async")
    if entry["narrow_offsets"]:
        wrong.append(f"{entry['narrow_offsets']} 32-bit offsets")
    return wrong


def cases(kernels: list[str], architectures: list[int]) -> Iterator[dict[str, Any]]:
    """Every kernel, format and table entry."""
    from fad_loss.ops._triton.configurations import TABLE

    for architecture in architectures:
        for kernel in kernels:
            for form, (_, _, widths) in FORMATS.items():
                for number in range(len(TABLE.get((kernel, form), ()))):
                    for channels in widths:
                        yield {
                            "kernel": kernel,
                            "format": form,
                            "channels": channels,
                            "entry": number,
                            "architecture": architecture,
                        }


def compile_case(case: dict[str, Any]) -> dict[str, Any]:
    """One entry of the report."""
    from fad_loss.ops._triton.configurations import TABLE
    from fad_loss.ops._triton.prepare import padded

    dtype, precision, _ = FORMATS[case["format"]]
    function, arguments = [
        (f, a)
        for f, a in record(case["kernel"], dtype, precision, case["channels"])
        if f.fn.__name__ not in {"prepare_kernel", "center_kernel", "rerank_kernel"}
    ][-1]
    stored = padded(case["channels"])
    tile = TABLE[case["kernel"], case["format"]][case["entry"]].arguments(stored)
    found = describe(function, {**arguments, **tile}, case["architecture"])
    return {**case, "function": function.fn.__name__, "tile": tile, **found}


def main() -> int:
    """Compile what is missing, write the report, say what is wrong."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=REPORT)
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES)
    parser.add_argument("--check", action="store_true", help="compile nothing")
    options = parser.parse_args()
    identity = {"triton": triton.__version__, "sources": sources_hash()}
    known: list[dict[str, Any]] = []
    if options.output.exists():
        report = json.loads(options.output.read_text())
        if {name: report[name] for name in identity} == identity:
            known = report["kernels"]
    keys = ("kernel", "format", "channels", "entry", "architecture")
    entries = {tuple(entry[key] for key in keys): entry for entry in known}
    missing = 0
    for case in cases(options.only, options.arch or list(ARCHITECTURES)):
        key = tuple(case[name] for name in keys)
        if key in entries:
            continue
        if options.check:
            missing += 1
            continue
        entries[key] = compile_case(case)
        print(*key, entries[key]["registers"], *problems(entries[key]), flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        report = {**identity, "kernels": sorted(entries.values(), key=lambda e: [e[k] for k in keys])}
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    wrong = [(key, text) for key, entry in entries.items() for text in problems(entry)]
    for key, text in wrong:
        print(*key, text, sep="  ")
    if missing:
        print(f"{missing} kernels are not in the report, or it is not of these sources")
    print(f"{len(entries)} compiled, {len(wrong)} problems")
    return 1 if wrong or missing else 0


if __name__ == "__main__":
    sys.exit(main())
