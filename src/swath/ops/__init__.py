"""The public functions, one a file, and their way to a backend, eager (operator.py) or traced (torch_ops.py)."""
