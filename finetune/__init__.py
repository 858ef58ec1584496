"""A folder of images → a checkpoint. Imports `models`, never `service`."""
