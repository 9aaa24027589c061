"""Drop-in replacements with other projects' names, signatures and conventions."""

from . import insightface

__all__ = ["insightface"]
