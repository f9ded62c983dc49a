"""One or a few shapes of every op: time, traffic, arithmetic, and the share of the roofline."""

from __future__ import annotations

from benchmarks.tables.markdown import listed, paragraph, table
from benchmarks.tables.ops import OURS, ms
from benchmarks.tables.results import Results

# File, op, shape.
SHAPES = (
    ("critic_head_cpu", "critic_head", "65536 x 128 x 10, f32"),
    ("critic_head_cpu", "critic_head", "2048 x 2048 x 1000, f32"),
    ("bn_relu_pool_cpu", "bn_relu_pool_critic_head", "128,64,32,32,2,f32,first"),
    ("bn_relu_pool_cpu", "bn_relu_pool", "128,64,32,32,2,f32,first"),
    ("bn_relu_pool_cpu", "bn_relu_pool", "128,64,32,32,2,bf16,first"),
    ("group_linear_cpu", "group_linear", "4096,512,512,10,relu,f32"),
    ("group_linear_cpu", "group_linear", "4096,512,512,10,relu,bf16"),
    ("group_linear_cpu", "group_linear", "16384,64,64,10,relu,f32"),
    ("vq_cpu", "vq_encode", "131072,1,4,256,f32,uniform"),
    ("vq_cpu", "vq_encode", "131072,1,32,256,f32,uniform"),
    ("vq_cpu", "vq_encode", "65536,1,64,1024,f32,uniform"),
    ("vq_decode_cpu", "vq_decode", "131072,1,8,256,f32,uniform"),
    ("vq_decode_cpu", "vq_update", "1,64,1024"),
    ("block_quantize_cpu", "block_quantize", "16777216,int8,f32"),
    ("block_quantize_cpu", "block_quantize", "16777216,int4,f32"),
    ("block_quantize_cpu", "block_quantize", "262144,int4,f32"),
    ("block_quantize_cpu", "block_dequantize", "16777216,int4,f32"),
)
# Older than `lct-fast bench`: its rows have sizes in place of a shape, and no roofline.
OLD = "critic_head_cpu"


def roofline(results: Results) -> str:
    """A row a shape."""
    rows = []
    for file, op, shape in SHAPES:
        ours = [row for row in results(file)["rows"] if row["contender"] == OURS]
        if file == OLD:
            (row,) = (r for r in ours if "{rows} x {depth} x {classes}, {dtype}".format(**r) == shape)
            figures = ["", "", ""]
        else:
            (row,) = (r for r in ours if (r["op"], r["shape"]) == (op, shape))
            figures = [
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['flops'] / 1e9:.2f}",
                f"{row['share_of_roofline']:.2f}",
            ]
        link = f"[{file}](../benchmarks/results/{file}.json)"
        shown = shape if file == OLD else shape.replace(",", ", ")
        rows.append([f"`{op}`", shown, ms(row), *figures, link, "not yet measured"])
    return table(["op", "shape", "ms", "MB", "GFLOP", "share", "file", "GPU"], rows)


def intro(results: Results) -> str:
    """Where the figures come from, and which files were disturbed."""
    files = list(dict.fromkeys(file for file, *_ in SHAPES))
    quiet = [file for file in files if results(file)["quiet"]]
    if len(quiet) == len(files):
        said = "All runs were quiet."
    else:
        but = f" but {listed(quiet)}" if quiet else ""
        said = f"The system disturbed most of these runs (`quiet` is false in all files{but})."
    return paragraph(
        "CPU, two threads, medians, the committed files of `lct-fast bench`; `critic_head`'s is of an older form "
        f"without a roofline. {said} `consensus` and `perturb`: not yet measured."
    )


TABLES = {"roofline-intro": intro, "roofline": roofline}
