"""`tq-jax gate --xla`: whole operations as XLA compiles them for an H100, without one.

XLA brings its own Triton, which contracts and schedules differently from the `triton` package: the registers counted
here are the registers that a device uses. XLA reads its flags once per process, so that compiling runs in a process of
its own.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from pallas_kernels.compat.lowering import lower_for_cuda, triton_kernels
from tq_jax.commands.gate import xla_loop
from tq_jax.commands.gate.case import Case
from tq_jax.commands.gate.cases import all_cases

ARCHITECTURE = "sm_90a"
PACKAGES = "jax-cuda13-pjrt", "jax-cuda13-plugin", "nvidia-cuda-nvcc"
CASES = {
    "attend dim 128",
    "append dim 128",
    "append one token",
    "append statistics, dim 128",
    "encode K4 haar",
    "encode prod 3",
    "encode V4 search, 32 rows",
    "decode K4/V4",
    *(f"prefill K{b}/V{b}, sm_90" for b in (2, 3, 4)),
}
"""Cases of the gate that are compiled; the remaining cases have the same kinds of arrays."""

KNOWN_SPILLS = {"prefill K4/V4, sm_90": 8}
"""Bytes known to spill: here a register outside of the loops, which the compiler of the triton package keeps."""

TARGET = Path(__file__).with_name("h100.txtpb")
"""Description of the device for XLA."""


def missing() -> str | None:
    """How to install the wheels that are missing; None if none is missing."""
    found = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13")
    if found and toolkit() is not None:
        return None
    return f"pip install {' '.join(PACKAGES)}"


def toolkit() -> Path | None:
    """Folder of the CUDA wheels, with an assembler; None if there is none."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) / "cu13" for place in (spec.submodule_search_locations or ()) if spec] if spec else []
    return next((place for place in places if (place / "bin" / "ptxas").is_file()), None)


def compile_all() -> list[dict[str, Any]]:
    """Compiles all kernels of CASES in a separate process, and returns their rows.

    Raises:
        RuntimeError: If compiling fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_gpu_cuda_data_dir={toolkit()} --xla_gpu_autotune_level=0 --xla_dump_to={folder}"
        # Only PTX is dumped: the output of every pass would be about 100 MB.
        flags += " --xla_gpu_dump_llvmir=true --xla_dump_emitter_re=ptx"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        command = [sys.executable, "-m", __name__, folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"XLA does not compile for {ARCHITECTURE}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of all kernels of CASES; XLA dumps into the folder."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET.read_text(), topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("gpu",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for op, case in all_cases():
        if f"{op} {case.name}" in CASES:
            yield from case_rows(f"{op} {case.name}", case, sharding, folder)
    yield xla_loop.row(sharding)


def case_rows(name: str, case: Case, sharding: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a case's kernels, each with the copies of arguments in the whole computation."""
    for old in folder.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), case.arguments)
    lowered = lower_for_cuda(case.function, *arguments, donated=case.donated)
    copies = copies_of(lowered.compile().as_text(), jax.tree.leaves(case.arguments))
    usage = "".join(assemble(path) for path in folder.glob("*.ptx"))
    thunks = "".join(path.read_text() for path in folder.glob("*thunk_sequence.txt"))
    for kernel in sorted({kernel.name for kernel in triton_kernels(lowered)}):
        taken = resources(usage, kernel)
        yield taken | {
            "kernel": f"xla: {name}: {kernel}",
            "config": case.config,
            "arch": ARCHITECTURE,
            "shared_bytes": max(map(int, re.findall(rf"{kernel} grid: .*?shared_memory: (\d+)", thunks)), default=0),
            "missing": [],
            "copies": copies,
            "ok": passes(name, copies, taken["spill_bytes"]),
        }


def passes(name: str, copies: list[str], spill_bytes: int) -> bool:
    """Whether a case neither copies the cache nor spills more than KNOWN_SPILLS allows.

    Example:
        >>> passes("encode prod 3", [], 0), passes("encode prod 3", [], 8), passes("prefill K4/V4, sm_90", [], 8)
        (True, False, True)
    """
    return not copies and spill_bytes <= KNOWN_SPILLS.get(name, 0)


def copies_of(hlo: str, arguments: list[Any]) -> list[str]:
    """Types of copied arrays in optimized HLO that are types of arguments of 32 KiB or more.

    Example:
        >>> copies_of("%copy.1 = u8[2048,1024]{1,0} copy(%p)", [jax.ShapeDtypeStruct((2048, 1024), "uint8")])
        ['u8[2048,1024]']
    """
    short = {"uint8": "u8", "uint16": "u16", "float16": "f16", "float32": "f32", "bfloat16": "bf16", "int32": "s32"}
    large = [x for x in arguments if x.size * x.dtype.itemsize >= 2**15]
    types = {f"{short[str(x.dtype)]}[{','.join(map(str, x.shape))}]" for x in large}
    return [found for found in re.findall(r"= \(?(\w+\[[\d,]*\])[^=\n]*? copy(?:-start)?\(", hlo) if found in types]


def assemble(ptx: Path) -> str:
    """The assembler's resource usage report on a PTX file."""
    tool = toolkit()
    assert tool is not None
    command = [tool / "bin" / "ptxas", "-v", f"-arch={ARCHITECTURE}", ptx, "-o", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def resources(usage: str, kernel: str) -> dict[str, int]:
    """Registers and spilled bytes of a kernel in an assembler's report.

    Example:
        >>> resources("properties for merge_1 8 bytes stack frame, 4 bytes spill stores: Used 40 registers", "merge")
        {'registers': 40, 'spill_bytes': 8}
    """
    pattern = rf"properties for {kernel}\w*\s+(\d+) bytes stack frame.*?Used (\d+) registers"
    found = re.findall(pattern, usage, flags=re.DOTALL)
    return {"registers": max(int(r) for _, r in found), "spill_bytes": max(int(stack) for stack, _ in found)}


if __name__ == "__main__":
    print(json.dumps(list(rows(Path(sys.argv[1])))))
