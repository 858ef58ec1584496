"""What a model is: backbone, freezing, preprocess, engine, checkpoint. Imports neither `finetune` nor `service`."""
