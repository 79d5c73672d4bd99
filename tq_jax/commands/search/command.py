"""`tq-jax search`: nearest-neighbour search on codes, compared with the quantizers of faiss at equal bytes."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tq_jax import search as nearest
from tq_jax.commands.claims import Claim
from tq_jax.commands.options import JsonTarget, Resume, picture_option, refusing
from tq_jax.commands.output import environment, known_rows, open_console, progress_bar, versions, write_json
from tq_jax.commands.search.data import SOURCES, DataSet, find, load
from tq_jax.commands.search.methods import (
    LEAST_TO_TRAIN,
    OBLIVIOUS,
    OURS,
    PQ,
    RABITQ,
    exact,
    faiss_pq,
    faiss_rabitq,
    faiss_scalar,
    one_thread,
    ours,
)

BITS = (2, 4)
PUBLISHED = {"basis": "random", "scale": "norm", "step_search": False, "center": False}
ABLATION: dict[str, dict[str, Any]] = {
    "TurboQuant prod, as published": PUBLISHED | {"kind": "prod"},
    "TurboQuant mse, as published": PUBLISHED,
    "+ unbiased scale": PUBLISHED | {"scale": "unbiased"},
    "+ centring": PUBLISHED | {"scale": "unbiased", "center": True},
    OBLIVIOUS: {"basis": "random"},
    OURS: {},
}
"""From the paper to the default, one change per line; "tq, random basis" is the third change, the step search."""

SCALAR = ("tqmse", "eden")
"""Scalar quantizers of faiss."""

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "XLA_FLAGS")
"""Environment variables that set the number of threads; threads that spin while they wait count as CPU time."""

SHARE = 2 / 3
"""Least share of the data sets on which recall must be at least that of a rival."""

SPEEDUP = 10.0
"""Least ratio of the encoding time of product quantization over the encoding time of this package."""


def search(
    json: JsonTarget = None,
    data: Annotated[str, typer.Option(help="Data sets, comma-separated: names or .npy files.")] = ",".join(SOURCES),
    plot: Annotated[Path | None, picture_option("recall against bytes")] = None,
    resume: Resume = False,
) -> None:
    """Compare nearest-neighbour search on codes with faiss: recall, encoding time, throughput.

    Measures recall 1@k of this package, and of product quantization, RaBitQ and scalar quantizers at equal bytes per
    vector, norms and scales counted, on real embeddings. The JSON file is written after every row.

    Exits 0 only if recall 1@1 at 2 and 4 bits is above product quantization and not below RaBitQ on two of three data
    sets, and encoding takes at most a tenth of the CPU time of product quantization.

    Faiss runs on one thread, so only CPU times can be compared. If other work disturbs them, give this package one
    thread too, with OPENBLAS_NUM_THREADS=1 and XLA_FLAGS=--xla_cpu_multi_thread_eigen=false.
    """
    console = open_console(json)
    source = environment()
    source["versions"] |= versions(["faiss-cpu"])
    source["threads"] = {name: os.environ[name] for name in THREADS if name in os.environ}
    rows = known_rows(json, source) if resume else []
    sets = load_all(data.split(","))
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(sets) * len(BITS) * (len(ABLATION) + 3 + len(SCALAR)) + len(sets))
        for one in sets:
            for label, work in _plan(one, rows):
                progress.update(task, description=f"{one.name}: {label['method']}")
                if not any(row.items() >= label.items() for row in rows):
                    rows.append(label | work())
                    if json != "-":
                        write_json(source | {"rows": rows}, json)
                progress.advance(task)
            console.print(_table(one, [row for row in rows if row["data"] == one.name]))
    claims = judge(rows)
    if few := sorted({row["data"] for row in rows if not row.get("enough_to_train", True)}):
        console.print(f"Not compared with {PQ}, which needs {LEAST_TO_TRAIN:,} vectors to train: {', '.join(few)}")
    for claim in claims:
        console.print(f"{claim.verdict}: {claim.name}: {claim.figure:.3g} (bound {claim.relation} {claim.bound:.3g})")
    write_json(source | {"rows": rows, "claims": [claim.as_dict() for claim in claims]}, json)
    if plot:
        from tq_jax.commands.search.picture import draw

        draw(rows, plot)
    if not all(claim.ok for claim in claims):
        raise typer.Exit(1)


def load_all(names: Sequence[str]) -> list[DataSet]:
    """Loads data sets, after checking that faiss is installed and that every name is known.

    Args:
        names: Keys of SOURCES, or .npy files.

    Raises:
        typer.BadParameter: If faiss is missing, or a data set cannot be loaded or is not supported.
    """
    with refusing("search"):
        one_thread()
        if len({find(name) for name in names}) < len(names):
            raise ValueError(f"expected data sets of different names, got {', '.join(names)}")
        sets = [load(name) for name in names]
        for one in sets:
            nearest.IndexSpec(dim=one.base.shape[1])
    return sets


Work = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
"""Labels of a row, and a function that measures the rest of the row."""


def _plan(data: DataSet, rows: list[dict[str, Any]]) -> Sequence[Work]:
    """The measurements on a data set, in order; some read rows of earlier measurements."""

    def bytes_of(method: str, bits: int) -> int:
        found = (r for r in rows if (r["data"], r["method"], r["bits"]) == (data.name, method, bits))
        return next(found)["bytes"]

    def at_bytes_of_rabitq(bits: int) -> dict[str, Any]:
        scalars = 4
        return ours(data, min((bytes_of(RABITQ, bits) - scalars) * 8 / data.base.shape[1], 8))

    plan: list[Work] = [({"method": "float32", "bits": 32}, lambda: exact(data))]
    for bits in BITS:
        for method, options in ABLATION.items():
            plan.append(({"method": method, "bits": bits}, lambda b=bits, o=options: ours(data, b, **o)))
        plan.append(({"method": PQ, "bits": bits}, lambda b=bits: faiss_pq(data, bytes_of(OURS, b))))
        plan.append(({"method": RABITQ, "bits": bits}, lambda b=bits: faiss_rabitq(data, b)))
        label = {"method": f"{OURS}, bytes of RaBitQ", "bits": bits}
        plan.append((label, lambda b=bits: at_bytes_of_rabitq(b)))
        for kind in SCALAR:
            name = f"QT_{bits}bit_{kind}"
            plan.append(({"method": f"faiss {kind}", "bits": bits}, lambda n=name: faiss_scalar(data, n)))
    return [({"data": data.name} | label, work) for label, work in plan]


def judge(rows: list[dict[str, Any]]) -> list[Claim]:
    """The claims of the command.

    Args:
        rows: Rows as in the command's JSON.

    Returns:
        The shares of data sets on which recall 1@1 is at least that of each rival at all widths, and the smallest ratio
        of encoding times. Product quantization is compared on data sets that suffice to train it, if there are any.
    """
    by_key = {(row["data"], row["method"], row["bits"]): row for row in rows}
    names = list(dict.fromkeys(row["data"] for row in rows))

    def margin(name: str, bits: int, method: str, rival: str) -> float:
        at1 = [by_key[name, which, bits]["recall"]["1"] for which in (method, rival)]
        return at1[0] - at1[1]

    trained = [n for n in names if all(by_key[n, PQ, b].get("enough_to_train", True) for b in BITS)]
    pq = {f"{n}, {b} bits": margin(n, b, OURS, PQ) for n in trained for b in BITS}
    equal = f"{OURS}, bytes of RaBitQ"
    rabitq = {f"{n}, {b} bits": margin(n, b, equal, RABITQ) for n in names for b in BITS}
    level = sum(all(rabitq[f"{n}, {b} bits"] >= 0 for b in BITS) for n in names) / len(names)
    ratios = {
        f"{n}, {b} bits": by_key[n, PQ, b]["encode_cpu_seconds"] / by_key[n, OURS, b]["encode_cpu_seconds"]
        for n in names
        for b in BITS
    }
    share = min(SHARE, 1.0) - 1e-9
    claims = []
    if trained:
        above = sum(all(pq[f"{n}, {b} bits"] > 0 for b in BITS) for n in trained) / len(trained)
        name = "share of data sets with recall 1@1 above faiss PQ at equal bytes"
        claims.append(Claim(name, above, ">=", share, details=pq))
    return [
        *claims,
        Claim("share with recall 1@1 at least that of faiss RaBitQ at its bytes", level, ">=", share, details=rabitq),
        Claim(
            "PQ training and encoding over ours, CPU time, least", min(ratios.values()), ">=", SPEEDUP, details=ratios
        ),
    ]


def _table(data: DataSet, rows: list[dict[str, Any]]) -> Table:
    title = f"{data.name}: {len(data.base):,} x {data.base.shape[1]}, {len(data.queries):,} queries"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    headings = ("bits", "bytes", "1@1", "1@2", "1@4", "1@8", "1@64", "encode s", "CPU s", "queries/s", "per CPU s")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        recalls = [f"{row['recall'][k]:.3f}" for k in ("1", "2", "4", "8", "64")]
        encode = [f"{row['encode_seconds']:.2f}", f"{row['encode_cpu_seconds']:.2f}"]
        speed = [f"{row['queries_per_second']:,.0f}", f"{row['queries_per_cpu_second']:,.0f}"]
        table.add_row(row["method"], str(row["bits"]), str(row["bytes"]), *recalls, *encode, *speed)
    return table
