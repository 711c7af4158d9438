"""Vision sides of checkpoints as ONNX graphs with ONNX's own operators, made of the weights without torch."""

from converters.vision.families import find_family
from converters.vision.weights import TYPES
from converters.vision.write import VisionFile, write_vision

__all__ = ["TYPES", "VisionFile", "find_family", "write_vision"]
