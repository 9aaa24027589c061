"""The laboratory: small nets trained with each loss and evaluated on unseen identities, for ``demo`` and ``compare``.

Modules, in the order in which they build on each other: ``plans`` (what is trained on, and how long), ``batches``,
``heads``, ``criteria`` (every loss by name), ``training`` (one training, step by step), ``agreement`` (fused against
reference), ``cost`` (time and memory), ``demo`` and ``comparison`` (the two experiments), ``record`` (their files),
``margin_pictures``, ``demo_pictures`` and ``comparison_pictures``.
"""
