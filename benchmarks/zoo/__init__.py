"""Every network of torchvision, and the demonstration networks, taken through all passes.

    python -m benchmarks.zoo [--only PATTERN] [--fresh]

Each one is captured, optimised, exported as it comes and as ours, and both files are compared with
the program in float64 under ONNX Runtime. What came out is written to `docs/zoo.md`, and its
figures to `docs/zoo.json`.
"""
