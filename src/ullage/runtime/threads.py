"""Keep torch's threads from burning the time that they wait for.

GNU OpenMP, which torch takes on Linux, lets a thread that waits for the others spin for hundreds of
thousands of turns before it sleeps. Where another process wants the same cores, the spinning keeps
the core from whoever is waited for: beside one busy process on two cores, 5,000 small products took
8.9 s that take 1.2 when a waiting thread sleeps after 5,000 turns, and 0.6 after 1,000. But that is
shorter than the gaps between the operators of a forward pass, for each of which it would have to be
woken: on idle cores a decode step of SmolLM2-135M took 70 ms, and 60 with 5,000.
"""

import os
import sys

_TURNS = 5000  # some 0.13 ms: longer than the gaps between operators


def give_way() -> None:
    """Let waiting threads sleep soon, unless the environment says how they are to wait. For
    nothing once torch is imported, whose OpenMP reads it then."""
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(_TURNS))
