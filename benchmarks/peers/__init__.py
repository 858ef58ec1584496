"""The same job in other people's hands: each script is one whole process, `--data DIR --weights FILE`, and ends with a line of JSON."""
