"""Throughput and memory of the head beside every peer: cases, providers, timing, memory, capacity and the cost model.

In the wheel, so that ``python -m fused_arcface bench`` measures an installed package. Modules, in the order in which
they build on each other: ``cases`` (shapes and inputs), ``truth`` (what is right, in fp64), ``providers`` (who computes
it), ``timing``, ``child`` and ``memory``, ``machine`` (ceilings and names), ``report`` (rows), ``runner`` (the run),
``capacity``, ``cost_model``, ``plots``.
"""
