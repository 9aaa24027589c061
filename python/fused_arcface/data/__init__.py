"""Images that come with the package or are made by it: what the demo, and training without files, run on."""

from .digits import digit_images
from .identities import Style, draw, identity_images
from .images import LabelledImages

__all__ = ["LabelledImages", "Style", "digit_images", "draw", "identity_images"]
