"""Embedding nets: the small one of the demo, IResNet, and timm's by name."""
