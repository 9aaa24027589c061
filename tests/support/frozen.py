"""Keeps the garbage collector off all objects that exist when this is imported: for a server of forked processes.

A collection in a fork would look at 300 000 objects of torch, and so copy the memory that the fork shares with its
server: a third of a second for each rank.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
