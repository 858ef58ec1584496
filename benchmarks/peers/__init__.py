"""The same tasks done with other frameworks.

A trainer is one whole process, `--data DIR --weights FILE`, and ends with a line of JSON.
"""
