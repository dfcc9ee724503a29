"""A Plan in, tokens out: load weights as planned, hold the budget, run sequences."""

from ullage.runtime import quiet as quiet
from ullage.runtime.allocator import expand_segments

expand_segments()  # here, because every way to torch's allocator leads through this package
