"""The engine: what happens between a head and a backend's kernels, in one process or over many ranks."""
