"""The base: checks, dtypes, random numbers and files that every layer uses. It imports no other layer."""
