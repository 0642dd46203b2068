"""Draws random small networks and checks what must hold of every one of them.

`network.py` is a network as a list of lines; the lines are drawn by `convolutions.py`,
`arithmetic.py`, `movement.py` and `linear.py`; `drawing.py` puts a case together, `properties.py`
checks it, and `fuzzing.py` lets Hypothesis draw and shrink. `python -m tests.random_graphs`, which
is `make fuzz`, goes on for as long as it is told to.

A failure becomes a test with a name of its own, beside those of the pass that was at fault.
"""
