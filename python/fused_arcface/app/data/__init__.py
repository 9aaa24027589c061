"""Images to train on and to evaluate with: files in several formats, and images that the package makes or ships."""

from fused_arcface.base.reading import DataError

from .digits import digit_images
from .formats import open_source
from .formats.folders import LabeledFolder, read_folder
from .formats.recordio import RecordFile, RecordWriter, pack_image, unpack_image
from .identities import Style, draw, identity_images
from .images import MAX_PIXELS, ImageError, ImageSpec, LabeledImages, read_image
from .sources import ImageSource

__all__ = [
    "MAX_PIXELS",
    "DataError",
    "ImageError",
    "ImageSource",
    "ImageSpec",
    "LabeledFolder",
    "LabeledImages",
    "RecordFile",
    "RecordWriter",
    "Style",
    "digit_images",
    "draw",
    "identity_images",
    "open_source",
    "pack_image",
    "read_folder",
    "read_image",
    "unpack_image",
]
