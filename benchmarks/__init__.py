"""Measurements of Graft against its peers and its own bounds.

The docstring of each program has its command and the numbers that it should show.
"""
