"""GPUs that Triton supports, and Triton's interpreter: every operator with every option."""
