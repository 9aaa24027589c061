"""Training runs on files.

They begin with a :class:`~fused_arcface.app.training.config.TrainConfig` and end in
:func:`fused_arcface.app.training.trainer.train`.
"""
