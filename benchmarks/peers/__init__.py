"""optfuse beside what people deploy otherwise, on every CPU engine and in every precision.

`python -m benchmarks.peers` writes `docs/benchmarks.md` and `docs/benchmarks.json`.
"""
