"""What a model is, and what it reads. Imports neither `finetune` nor `service`."""
