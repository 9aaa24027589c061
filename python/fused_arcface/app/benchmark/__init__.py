"""Throughput and memory of the head beside every peer: cases, providers, timing, memory, capacity and the cost model.

It is in the wheel, so that ``python -m fused_arcface bench`` measures an installed package. Modules, in the order in
which they build on each other: ``cases`` (shapes and inputs), ``truth`` (right results, in fp64), ``names``,
``peers`` and ``providers`` (the implementations), ``memory``, ``report`` (rows), ``runner`` (the run), ``capacity``,
``cost_model``, ``ranks``, ``plots``. Timers, child processes and the machine's ceilings are in ``app.measure``.
"""
