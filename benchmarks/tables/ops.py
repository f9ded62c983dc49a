"""Times of the ops on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.tables.markdown import between, listed, paragraph, table
from benchmarks.tables.results import Results

Row = dict[str, Any]
OURS = "lct_fast"
SHORT = {
    "torch eager": "eager",
    "torch.compile": "compile",
    "torch.compile max-autotune-no-cudagraphs": "compile, max-autotune",
}
INSTRUCTION_SETS = {"avx512vnni": "AVX-512 VNNI", "avx512": "AVX-512", "avx2": "AVX2"}

# The README's table of the other ops: file, op, shape, what the row calls it.
OTHERS = (
    ("bn_relu_pool_cpu", "bn_relu_pool_critic_head", "128,64,32,32,2,f32,first",
     "`bn_relu_pool` + `critic_head`, forward and backward, 128 x 64 x 32 x 32, f32"),
    ("group_linear_cpu", "group_linear", "4096,512,512,10,relu,f32",
     "`group_linear`, forward and backward, 4096 x 512 x 512, 10 classes, f32"),
    ("group_linear_cpu", "group_linear", "4096,512,512,10,relu,bf16", "the same, bf16"),
    ("vq_cpu", "vq_encode", "131072,1,4,256,f32,uniform",
     "`vq_encode`, 131072 x 4, 256 words, against faiss's search alone"),
    ("vq_cpu", "vq_encode", "131072,1,8,256,f32,uniform", "`vq_encode`, 131072 x 8, 256 words"),
    ("vq_cpu", "vq_encode", "131072,1,32,256,f32,uniform", "`vq_encode`, 131072 x 32, 256 words"),
    ("vq_cpu", "vq_encode", "65536,1,64,1024,f32,uniform", "`vq_encode`, 65536 x 64, 1024 words"),
    ("block_quantize_cpu", "block_quantize", "16777216,int4,f32",
     "`block_quantize`, 16.8 million values, int4, f32"),
)  # fmt: skip

# vq.md: columns, and how many times as fast as faiss the search was meant to be, uniform fp32 rows.
FAISS_AIMS = {4: 3.5, 8: 3.0, 32: 1.8, 64: 5.0}
# And as a training forward of vector-quantize-pytorch.
TRAINING_AIM = 30.0


class Pair(NamedTuple):
    """Ours and the fastest rival on one shape."""

    ours: Row
    rival: Row

    @property
    def times(self) -> float:
        return float(self.rival["us_p50"] / self.ours["us_p50"])


def pairs(report: Row) -> dict[tuple[str, str], Pair]:
    """By op and shape, in the file's order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in report["rows"]:
        if row["us_p50"] is not None:
            found.setdefault((row["op"], row["shape"]), []).append(row)
    return {
        key: Pair(
            next(r for r in rows if r["contender"] == OURS),
            min((r for r in rows if r["contender"] != OURS), key=lambda r: float(r["us_p50"])),
        )
        for key, rows in found.items()
    }


def ms(row: Row) -> str:
    return f"{row['us_p50'] / 1e3:.2f}"


def _page(results: Results, file: str) -> str:
    """Every shape of an op, beside the best of torch."""
    rows = [
        [
            op,
            shape.replace(",", ", "),
            ms(pair.ours),
            f"{ms(pair.rival)} ({SHORT[pair.rival['contender']]})",
            f"{pair.times:.2f}x",
            f"{pair.ours['peak_bytes'] / 1e6:.1f}, {pair.rival['peak_bytes'] / 1e6:.1f}",
        ]
        for (op, shape), pair in pairs(results(file)).items()
    ]
    return table(
        ["op", "shape", "ms", "best of torch, ms", "", "most memory at once, MB: ours, theirs"], rows
    )


def _pages(report: Row) -> str:
    return "huge" if report["huge_pages"] else "small"


def _disturbed(reports: Sequence[Row]) -> str:
    """What else the machine did, by the files' own measure."""
    share = between([100 * r["foreign_cpu_share"] for r in reports], ".1f")
    said = f"Other programs took about {share} % of the machine"
    if all(r["quiet"] for r in reports):
        return f"{said}."
    return (
        f"{said}, and yet the system disturbed more than a fifth of some rows' samples (`quiet` is false in the file"
        f"{'s' if len(reports) > 1 else ''})."
    )


def _conditions(results: Results, *files: str) -> str:
    """How the files of a page were measured."""
    reports = [results(file) for file in files]
    first = reports[0]
    simd = INSTRUCTION_SETS[first["instruction_set"]]
    return paragraph(
        f"Medians, {first['threads']} threads, {first['device']} with {simd}, {_pages(first)} pages for all, "
        "contenders "
        "in turns, outputs checked first.",
        _disturbed(reports),
    )


def bn_relu_pool(results: Results) -> str:
    return _page(results, "bn_relu_pool_cpu")


def bn_relu_pool_conditions(results: Results) -> str:
    return _conditions(results, "bn_relu_pool_cpu")


def group_linear(results: Results) -> str:
    return _page(results, "group_linear_cpu")


def group_linear_conditions(results: Results) -> str:
    return _conditions(results, "group_linear_cpu")


def block_quantize(results: Results) -> str:
    return _page(results, "block_quantize_cpu")


def block_quantize_conditions(results: Results) -> str:
    return _conditions(results, "block_quantize_cpu")


def critic_head(results: Results) -> str:
    """The README's shapes; this file is older than `lct-fast bench` and has names of its own."""
    names = ("lct_fast", "torch.compile", "torch.compile max-autotune-no-cudagraphs", "torch eager")
    found: dict[str, dict[str, Row]] = {}
    for row in results("critic_head_cpu")["rows"]:
        shape = f"{row['rows']} x {row['depth']} x {row['classes']}, {row['dtype']}"
        found.setdefault(shape, {})[row["contender"]] = row
    rows = [
        [shape, *(ms(of[name]) for name in names), f"{of[OURS]['times_as_fast_as_best_rival']:.2f}x"]
        for shape, of in found.items()
    ]
    head = ["rows x depth x classes", "critic_head", "torch.compile", "max-autotune", "eager"]
    return table([*head, "times the best rival"], rows)


def critic_head_intro(results: Results) -> str:
    """How it was measured."""
    report = results("critic_head_cpu")
    other = results("critic_head_cpu_small_pages")
    folder = "benchmarks/results"
    return paragraph(
        "`critic_head` on the CPU: loss and all gradients of linear + softmax cross-entropy in one call, "
        "against forward "
        f"and backward in torch, interleaved in one process, {report['threads']} threads, {_pages(report)} "
        "pages for all; median "
        f"ms of {max(row['samples'] for row in report['rows'])}. Every output was checked against float64 "
        "before it was "
        "timed.",
        _disturbed([report]),
        f"[{folder}/critic_head_cpu.json]({folder}/critic_head_cpu.json); with {_pages(other)} pages: "
        f"[critic_head_cpu_small_pages.json]({folder}/critic_head_cpu_small_pages.json). "
        "`lct-fast bench critic_head --threads 2 --out FILE` measures it now.",
    )


def others(results: Results) -> str:
    """One row or a few of each other op."""
    rows: list[list[str]] = []
    before = ""
    for file, op, shape, words in OTHERS:
        pair = pairs(results(file))[op, shape]
        times = f"{pair.times:.2f}x"
        if op == "bn_relu_pool_critic_head":
            memory = [pair.ours["peak_bytes"] / 1e6, pair.rival["peak_bytes"] / 1e6]
            times += f", in {memory[0]:.0f} MB against {memory[1]:.0f}"
        link = "the same" if file == before else f"[{file}.json](benchmarks/results/{file}.json)"
        rows.append([words, ms(pair.ours), ms(pair.rival), times, link])
        before = file
    return table(["op, shape", "ms", "best rival", "times the rival", "file"], rows)


def others_intro(results: Results) -> str:
    """How they were measured, and whether in quiet."""
    files = list(dict.fromkeys(file for file, *_ in OTHERS))
    loud = [file for file in files if not results(file)["quiet"]]
    if len(loud) == len(files):
        said = "The system disturbed these runs (`quiet` is false in the files)."
    else:
        said = f"The system disturbed the runs of {listed(loud)} (`quiet` is false there)." if loud else ""
    return paragraph(
        "The other ops on the CPU, 2 threads, medians in ms against the best of torch eager and torch.compile, or the "
        "package named; more shapes, memory and conditions in the pages.",
        said,
    )


def vq(results: Results) -> str:
    """Encoding beside faiss's search and, from another run, a training forward."""
    search, training = pairs(results("vq_cpu")), pairs(results("vq_cpu_training_step"))
    rows = []
    for key, pair in search.items():
        other = training[key]
        rows.append(
            [
                key[1].replace(",", ", "),
                ms(pair.ours),
                ms(pair.rival),
                f"{pair.times:.2f}x",
                f"{other.rival['us_p50'] / 1e3:.0f}",
                f"{other.times:.0f}x",
                f"{pair.ours['peak_bytes'] / 1e6:.2f}, {other.rival['peak_bytes'] / 1e6:.0f}",
            ]
        )
    faiss = ["vq_encode, ms", "faiss, search alone, ms", ""]
    rest = ["vector-quantize-pytorch, training forward, ms", "", "most memory at once, MB: ours, theirs"]
    return table(["N, G, D, K", *faiss, *rest], rows)


def vq_conditions(results: Results) -> str:
    return _conditions(results, "vq_cpu", "vq_cpu_training_step")


def vq_words(results: Results) -> str:
    """Which aims are met, and what decoding and updating cost."""
    search = pairs(results("vq_cpu"))
    aims = []
    for (_, shape), pair in search.items():
        depth = pair.ours["sizes"]["depth"]
        if shape.endswith("f32,uniform"):
            met = "met" if pair.times >= FAISS_AIMS[depth] else "**not met**"
            aims.append(f"{FAISS_AIMS[depth]:g}x with {depth} columns is {met} ({pair.times:.2f}x)")
    training = [pair.times for pair in pairs(results("vq_cpu_training_step")).values()]
    met = "met everywhere" if min(training) >= TRAINING_AIM else "**not met** everywhere"
    rest = pairs(results("vq_decode_cpu"))
    decode, update = (
        [p.times for (op, _), p in rest.items() if op == name] for name in ("vq_decode", "vq_update")
    )
    return paragraph(
        f"Of the aims against faiss, uniform fp32 rows, {listed(aims)}.",
        f"{TRAINING_AIM:.0f}x of a training forward is {met} ({between(training)}x).",
        "Decoding, [vq_decode_cpu.json](../benchmarks/results/vq_decode_cpu.json): "
        f"{between(decode, '.2f')} times as fast as torch.compile's gather and bit arithmetic; updating "
        f"{between(update, '.1f')} times as fast.",
    )


TABLES = {
    "critic-head-intro": critic_head_intro,
    "critic-head": critic_head,
    "ops-intro": others_intro,
    "ops": others,
    "bn-relu-pool-conditions": bn_relu_pool_conditions,
    "bn-relu-pool": bn_relu_pool,
    "group-linear-conditions": group_linear_conditions,
    "group-linear": group_linear,
    "block-quantize-conditions": block_quantize_conditions,
    "block-quantize": block_quantize,
    "vq-conditions": vq_conditions,
    "vq": vq,
    "vq-words": vq_words,
}
