"""Keep torch's threads from burning the time that they wait for.

GNU OpenMP, which torch takes on Linux, lets a thread that waits for the others spin for millions of
turns before it sleeps. Where another process wants the same cores, the spinning keeps the core from
whoever is waited for: beside one busy process on two cores, small products took 26 to 31 s that
take 0.6 to 1.1 s when waiting threads give way soon.
"""

import os
import sys

_TURNS = 1000  # some microseconds: longer than the gaps inside a forward pass


def give_way() -> None:
    """Let waiting threads sleep soon, unless the environment says how they are to wait. For
    nothing once torch is imported, whose OpenMP reads it then."""
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(_TURNS))
