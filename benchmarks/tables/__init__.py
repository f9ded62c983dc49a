"""Tables, sentences with figures, and plots of README, docs/ and benchmarks/README.md, from committed result files.

    python -m benchmarks.tables            writes them all
    python -m benchmarks.tables --check    writes nothing; names what drifted; exit status 1 if anything did

A page marks the place of each (`marks`), a module a topic makes the text (`registry` has them all).
"""
