"""Vision sides of checkpoints as ONNX graphs with ONNX's own operators, made of the weights without torch."""

from converters.vision.families import Family, find_family
from converters.vision.weights import TYPES
from converters.vision.write import VisionFile, planned_graph, read_vision, write_vision

__all__ = ["TYPES", "Family", "VisionFile", "find_family", "planned_graph", "read_vision", "write_vision"]
