"""Larimar: facts that are written, edited and forgotten in one shot, outside the weights."""
