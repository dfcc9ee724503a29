"""A Plan in, tokens out: load weights as planned, hold the budget, run sequences."""

from ullage.runtime import quiet as quiet
from ullage.runtime.allocator import expand_segments
from ullage.runtime.threads import give_way

# here, because every command comes to torch through this package
expand_segments()
give_way()
