"""Checkpoint → HTTP. Imports `models` alone, never `finetune`, and no torch unless it runs on CUDA."""
