"""Training runs on files, from :class:`~fused_arcface.app.training.config.TrainConfig` to
:func:`fused_arcface.app.training.trainer.train`."""
