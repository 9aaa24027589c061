"""Measuring: child processes, this machine, and interleaved timing."""
