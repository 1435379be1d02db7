"""What the kernels compile to, for GPUs that need not be there: registers, spills, instructions.

Every kernel of `fad_loss.ops._triton` and every entry of its table of tiles is compiled for sm_80,
sm_90, sm_100 and sm_120, with the arguments that the library itself would pass (recorded from a run
on meta tensors), the heaviest ones: several temperatures with biases, ragged clouds, exclude_self.
Results go to a JSON for each version of Triton; what is wrong in it is printed and makes the exit
status 1:

- a stack frame (registers spilled to memory), or more shared memory than the GPU has;
- a missing matrix instruction of the target's own: mma (sm_80 and sm_120), wgmma (sm_90), tcgen05
  (sm_100);
- no asynchronous copies (cp.async) into the tiles;
- a 32-bit number added to a pointer to a whole tensor.

    python benchmarks/kernels_report.py                        # all, 10 to 20 minutes on 2 cores
    python benchmarks/kernels_report.py --only backward --arch 90  # some
    python benchmarks/kernels_report.py --check                # compile nothing: are they current?

An interrupted run continues where it was: entries of unchanged sources are kept.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from estimates import limits
from fad_loss.ops import _triton
from fad_loss.ops._triton import configurations, prepare, search, small, smooth_minimum
from fad_loss.ops._triton.configurations import Tile, entries, fitting
from fad_loss.ops._triton.prepare import padded

RESULTS = Path(__file__).resolve().parent / "results"
# A report for each version of Triton.
NAME = "kernels-report-{}.json"
ARCHITECTURES = (80, 90, 100, 120)
# Shared memory of a block, in KiB; on sm_86 and sm_89, which run what is compiled for sm_80, 99.
SHARED = {80: 99, 90: 227, 100: 227, 120: 99}
MATRIX = {80: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
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
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# Formats, each with the channels that can make a difference.
FORMATS = {
    "direct": (torch.float32, "highest", (3,)),
    "bf16x6": (torch.float32, "highest", (32, 64, 256)),
    "tf32": (torch.float32, "high", (32, 64, 128, 256, 512)),
    "half": (torch.bfloat16, "high", (64, 128, 256, 512)),
}
KEYS = ("kernel", "format", "channels", "entry", "architecture")
KERNELS = (
    *("reduce", "backward", "double_backward", "small_reduce", "small_backward", "scan"),
    *("shortlist", "longlist", "exact_reduce", "exact_backward", "exact_double_backward"),
)
NEIGHBORS = {"scan": 1, "shortlist": 60, "longlist": 64}

Key = tuple[Any, ...]
Launches = list[tuple[Any, dict[str, Any]]]


def recorded(call: Callable[[], object], precision: str) -> Launches:
    """The launches that a call of the backend makes, without making them."""
    launches: Launches = []

    def keep(function: Any, _: tuple[int, ...], arguments: dict[str, Any]) -> None:
        launches.append((function, arguments))

    modules = (configurations, prepare, search, small, smooth_minimum)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(mock.patch.object(module, "launch", keep))
            call()
    finally:
        torch.set_float32_matmul_precision(before)
    return launches


def main_launch(launches: Launches, *, exact: bool = False) -> tuple[Any, dict[str, Any]]:
    """The last one of a kernel that walks over pairs, or, exact, that computes rows anew."""
    others = {"prepare_kernel", "rerank_kernel", "merge_kernel"}
    return [
        (function, arguments)
        for function, arguments in launches
        if function.fn.__name__ not in others and arguments.get("EXACT", False) == exact
    ][-1]


def heaviest(kernel: str, dtype: torch.dtype, channels: int) -> Callable[[], object]:
    """A call that launches the kernel as it needs the most registers."""
    kernel = kernel.removeprefix("exact_")
    x = torch.empty(100_000, channels, dtype=dtype, device="meta")
    values = torch.empty(100_000, 4, device="meta")
    offsets = torch.empty(9, dtype=torch.int64, device="meta")
    clouds = (True, offsets, offsets)
    epsilon = [0.3, 0.5, 0.7, 1.0]
    moves = x.to(torch.float32)
    few = torch.empty(8, small.LARGEST, channels, dtype=dtype, device="meta")
    some = torch.empty(8, small.LARGEST, 4, device="meta")
    whole = (True, None, None)
    both = values, values, values, epsilon
    calls: dict[str, Callable[[], object]] = {
        "reduce": lambda: _triton.softmin(x, x, values, epsilon, *clouds),
        "backward": lambda: _triton.softmin_backward(
            values, x, x, values, values, epsilon, *clouds, True, True
        ),
        "small_reduce": lambda: _triton.softmin(few, few, some, epsilon, *whole),
        "small_backward": lambda: _triton.softmin_backward(
            some, few, few, some, some, epsilon, *whole, True, True
        ),
        "double_backward": lambda: _triton.softmin_double_backward(
            moves, moves, values, values, x, x, *both, *clouds
        ),
    }
    return calls.get(kernel, lambda: _triton.knn(x, x, NEIGHBORS[kernel], *clouds))


def compiled(function: Any, arguments: dict[str, Any], architecture: int) -> Any:
    """Compile a kernel for a GPU that need not be there."""
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


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and stack of a compiled kernel, as cuobjdump reports them."""
    text = _cuobjdump(cubin, "-res-usage")
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


def narrow_offsets(ttir: str) -> int:
    """How many scalar pointers to points or values have a 32-bit number added to them.

    Tiles are addressed from a scalar pointer to their first point, by offsets within the tile; the
    scalar one is where a large tensor would overflow. Constants (a channel) and indices of clouds
    are small.
    """
    added = re.findall(r"tt\.addptr %\S+, %(\S+) : !tt\.ptr<b?f\d+>, i32", ttir)
    constants = set(re.findall(r"%(\S+) = arith\.constant", ttir))
    return sum(name not in constants for name in added)


def loops(cubin: bytes) -> tuple[int, int]:
    """Machine instructions of the loop over the columns, and of the loop over channels inside.

    The largest backward jump is the loop over the columns; the largest well inside it, if there is
    any, that over blocks of channels. Waiting for a barrier is a loop of a few instructions.
    """
    text = _cuobjdump(cubin, "-sass")
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)
    places = [int(address, 16) for address, _ in lines]
    found = []
    for place, (_, instruction) in zip(places, lines, strict=True):
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        if jump and int(jump[1], 16) < place:
            found.append((int(jump[1], 16), place))
    sizes = {span: sum(span[0] <= place <= span[1] for place in places) for span in found}
    if not sizes:
        return 0, 0
    outer = max(sizes, key=lambda span: sizes[span])
    inside = [
        size
        for span, size in sizes.items()
        if outer[0] < span[0] and span[1] < outer[1] and 40 <= size < 0.95 * sizes[outer]
    ]
    return sizes[outer], max(inside, default=0)


def describe(function: Any, arguments: dict[str, Any], architecture: int) -> dict[str, Any]:
    """Compile, and count."""
    result = compiled(function, arguments, architecture)
    ptx = result.asm["ptx"]
    loop, inner = loops(result.asm["cubin"])
    return {
        **usage(result.asm["cubin"]),
        "loop": loop,
        "inner_loop": inner,
        # What prepares, or brings shares together, has no tile of rows and columns.
        "limits": limits(function.fn.__name__, arguments, architecture, (loop, inner))
        if {"BLOCK_ROWS", "BLOCK_COLUMNS"} <= set(arguments)
        else {},
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
    multiplies = entry["format"] != "direct" and not entry["kernel"].startswith("exact_")
    # Small clouds have fewer rows than a warp group's instructions take.
    few = entry["tile"]["BLOCK_ROWS"] < 64
    matrix = "mma" if few else MATRIX[architecture]
    if multiplies and not instructions[matrix]:
        wrong.append(f"no {matrix}")
    # The short list's inner loop keeps tiles of a single block of channels from being pipelined.
    single = entry["channels"] <= entry["tile"]["BLOCK_CHANNELS"]
    listed = entry["function"] == "shortlist_kernel" and single
    # Points of small clouds are centered on their way, in registers.
    pipelined = multiplies and not listed and not entry["function"].startswith("small_")
    if pipelined and not instructions["cp.async"]:
        wrong.append("no cp.async")
    if entry["narrow_offsets"]:
        wrong.append(f"{entry['narrow_offsets']} 32-bit offsets")
    return wrong


def cases(kernels: list[str], architectures: list[int]) -> Iterator[dict[str, Any]]:
    """Every kernel, format and table entry."""
    for architecture in architectures:
        for kernel in kernels:
            for form, (_, _, widths) in FORMATS.items():
                tiles = tiles_of(kernel, form, architecture)
                for number, channels in used(kernel, tiles, widths):
                    yield {
                        "kernel": kernel,
                        "format": form,
                        "channels": channels,
                        "entry": number,
                        "architecture": architecture,
                    }


def tiles_of(kernel: str, form: str, architecture: int) -> tuple[Tile, ...]:
    """The table's entries; for rows that are computed anew there is one, whatever the kernel."""
    if kernel.startswith("exact_"):
        found = (configurations.exact_tile(architecture // 10),)
        return found if form in {"bf16x6", "half"} else ()
    return entries(kernel, form, architecture // 10)


def used(
    kernel: str, tiles: tuple[Tile, ...], widths: tuple[int, ...]
) -> Iterator[tuple[int, int]]:
    """Entries of the table with the channels that they are used for and that differ to them."""
    if kernel.startswith(("small_", "exact_")):
        # More channels are more rounds of the same loop.
        yield from ((number, widths[-1]) for number in range(len(tiles)))
        return
    forms: dict[tuple[Any, ...], tuple[int, int]] = {}
    for channels in widths if tiles else ():
        stored = padded(channels)
        for number in fitting(tiles, stored):
            # Of those that are kept the most are the worst; where blocks are reread the loop is the
            # same from two on.
            kept = stored <= tiles[number].all_kept
            tile = tiles[number].arguments(stored)
            reread = () if kept else (stored == tile["BLOCK_CHANNELS"], *tile.items())
            forms[number, kept, reread] = number, channels
    yield from forms.values()


def launched(case: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A case's kernel, its arguments, and those of them that are its tile."""
    dtype, precision, _ = FORMATS[case["format"]]
    call = heaviest(case["kernel"], dtype, case["channels"])
    exact = case["kernel"].startswith("exact_")
    function, arguments = main_launch(recorded(call, precision), exact=exact)
    tiles = tiles_of(case["kernel"], case["format"], case["architecture"])
    tile = tiles[case["entry"]].arguments(padded(case["channels"]))
    if "SHARED" in arguments and not exact:
        tile["SHARED"] = tile["BLOCK_COLUMNS"]
    return function, {**arguments, **tile}, tile


def identity(case: dict[str, Any]) -> dict[str, Any]:
    """A case with what its compiled form depends on."""
    function, _, tile = launched(case)
    name = function.fn.__name__
    return {**case, "function": name, "source": fingerprint(name), "tile": tile}


@cache
def functions() -> dict[str, ast.FunctionDef]:
    """The source of every function that Triton compiles, by name."""
    found = {}
    for path in sorted(Path(_triton.__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list
            ):
                # What it is for does not change what it compiles to.
                node.body = node.body[1:] if ast.get_docstring(node) else node.body
                found[node.name] = node
    return found


@cache
def fingerprint(name: str) -> str:
    """A fingerprint of the source of a kernel and of the functions that it calls."""
    waiting, reached = [name], set()
    while waiting:
        current = waiting.pop()
        reached.add(current)
        names = {n.id for n in ast.walk(functions()[current]) if isinstance(n, ast.Name)}
        waiting += sorted((names & set(functions())) - reached)
    text = "".join(ast.unparse(functions()[each]) for each in sorted(reached))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compile_case(case: dict[str, Any]) -> dict[str, Any]:
    """One entry of the report."""
    function, arguments, _ = launched(case)
    return {**identity(case), **describe(function, arguments, case["architecture"])}


def entries_in(path: Path) -> dict[Key, dict[str, Any]]:
    """What a report says, by case."""
    if not path.exists():
        return {}
    return {tuple(e[key] for key in KEYS): e for e in json.loads(path.read_text())["kernels"]}


def is_current(entry: dict[str, Any] | None, case: dict[str, Any]) -> bool:
    """Whether an entry is of the sources and the table as they are now."""
    if entry is None or not identity(case).items() <= entry.items() or "loop" not in entry:
        return False
    function, arguments, _ = launched(case)
    counted = entry["loop"], entry["inner_loop"]
    wanted = limits(function.fn.__name__, arguments, case["architecture"], counted)
    return bool(entry["limits"] == wanted)


def check(path: Path) -> int:
    """Print what is wrong with a report, whichever version of Triton it is of."""
    known, wrong = entries_in(path), []
    for case in cases(list(KERNELS), list(ARCHITECTURES)):
        key = tuple(case[name] for name in KEYS)
        found = problems(known[key]) if is_current(known.get(key), case) else ["is not compiled"]
        wrong += [(*key, text) for text in found]
    for line in wrong:
        print(*line)
    print(f"{path.name}: {len(known)} kernels, {len(wrong)} problems", flush=True)
    return 1 if wrong else 0


def main() -> int:
    """Compile what is missing, write the report, say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="(results/kernels-report-TRITON.json)")
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--check", action="store_true", help="compile nothing, check all reports")
    options = parser.parse_args()
    if options.check:
        reports = [options.output] if options.output else sorted(RESULTS.glob(NAME.format("*")))
        return max((check(path) for path in reports), default=1)
    output = options.output or RESULTS / NAME.format(triton.__version__)
    known, wrong = entries_in(output), []
    kept: dict[Key, dict[str, Any]] = {}
    for case in cases(list(KERNELS), list(ARCHITECTURES)):
        key = tuple(case[name] for name in KEYS)
        wanted = (
            case["kernel"] in options.only
            and case["format"] in options.formats
            and case["architecture"] in (options.arch or ARCHITECTURES)
        )
        if wanted and not is_current(known.get(key), case):
            known[key] = compile_case(case)
            print(*key, known[key]["registers"], *problems(known[key]), flush=True)
            # Written as it grows, so that an interrupted run loses nothing.
            write(output, [known[key] for key in sorted(known)])
        if key in known:
            kept[key] = known[key]
            wrong += [(*key, text) for text in problems(known[key]) if wanted]
    # Without entries that the table does not have any more.
    write(output, [kept[key] for key in sorted(kept)])
    for line in wrong:
        print(*line)
    print(f"{output.name}: {len(kept)} kernels, {len(wrong)} problems")
    return 1 if wrong else 0


def write(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write the report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"triton": triton.__version__, "kernels": entries}
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
