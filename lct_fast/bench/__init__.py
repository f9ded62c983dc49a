"""How fast the ops are here and now, beside plain torch and other packages: what `lct-fast bench` runs.

Every contender's outputs are checked against float64 before it is timed. An op's inputs, contenders and shapes are
one file in `lct_fast.bench.cases`.
"""
