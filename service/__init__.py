"""Checkpoint → HTTP. Imports `models` only, and torch only where it runs on CUDA."""
