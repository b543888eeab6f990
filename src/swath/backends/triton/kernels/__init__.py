"""The Triton kernels, one file each, and what they share: the walk over key tiles, and query rows."""
