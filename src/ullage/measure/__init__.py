"""Run things, and say what they really took."""
