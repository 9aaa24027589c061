"""An interpreter of the PTX that nvcc makes of csrc/cuda, and a GPU of it for the backend (host.py). tests/README.md
says what it proves."""
