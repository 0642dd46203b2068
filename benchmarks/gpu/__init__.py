"""The proof on a GPU: every network of `models/`, before and after the passes, on every engine.

`python -m benchmarks.gpu` writes `docs/gpu.md` and `docs/gpu.json` on a machine with an NVIDIA GPU.
"""
