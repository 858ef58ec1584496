"""Measurements of Graft against its peers and against its own bounds; each file's docstring has its command and its numbers."""
