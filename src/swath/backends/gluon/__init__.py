"""What kernels written in Gluon share, whatever the architecture: the scheduler of work tiles, pipelines, names."""
