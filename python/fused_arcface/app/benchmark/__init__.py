"""Throughput and memory of the head beside every peer: cases, providers, timing, memory, capacity and the cost model.

It is in the wheel, so that ``python -m fused_arcface bench`` measures an installed package. Each module imports only
earlier ones of this list: ``cases`` (shapes and inputs), ``truth`` (right results, in fp64), ``names``, ``peers`` and
``providers`` (the implementations), ``memory``, ``report`` (rows), ``runner`` (the run), ``graph_replay``,
``capacity``, ``cost_model``, ``stored_model``, ``ranks``, ``plots``, ``apart`` (for the scripts in ``bench/``).
Timers, child processes and the machine's ceilings are in ``app.measure``.
"""
