"""The applications: the command line and what its commands do. The library imports none of them."""
