"""Results of named nodes while llama.cpp computes a graph, through the context parameter ``cb_eval``.

The scheduler asks before each node whether its result is wanted, and calls again when it is there. Of a tensor's struct
only the beginning is read: type, buffer, sizes and strides, which stand first in ``ggml.h``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from mopeq_edge.ggml.types import F32, I32
from mopeq_edge.runtime.locate import library_path

Array = npt.NDArray[Any]
_DTYPES = {F32.id: np.dtype("<f4"), I32.id: np.dtype("<i4")}
_AXES = 4


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * _AXES),
        ("nb", ctypes.c_size_t * _AXES),
    )


class NodeReader:
    """Hands the results of the nodes that ``wanted`` picks by name to ``receive``, in the order of the graph.

    ``receive`` gets the name and an array of its own in numpy's order of axes (the reverse of ggml's, without leading
    ones), float32 or int32. Give it to :class:`mopeq_edge.binding.LlamaModel`. An error in one of the two functions
    cannot pass through llama.cpp: :meth:`check` raises it afterwards.
    """

    def __init__(self, wanted: Callable[[str], bool], receive: Callable[[str, Array], None]) -> None:
        self._wanted, self._receive = wanted, receive
        self._error: Exception | None = None
        lib = ctypes.CDLL(str(library_path("ggml-base")))
        self._name = lib.ggml_get_name
        self._name.restype, self._name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        self._nbytes = lib.ggml_nbytes
        self._nbytes.restype, self._nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        self._get = lib.ggml_backend_tensor_get
        self._get.restype = None
        self._get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]

    def callback(self, c: ModuleType) -> Any:
        """What goes into ``cb_eval``; keep it as long as the context."""
        return c.ggml_backend_sched_eval_callback(self._called)

    def check(self) -> None:
        """Raise the first error that reading caused."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _called(self, tensor: int, asks: bool, _data: object) -> bool:
        try:
            name = (self._name(tensor) or b"").decode(errors="replace")
            if not self._wanted(name):
                # asked: do not stop for it; else: go on
                return not asks
            if not asks:
                self._receive(name, self._read(tensor))
        except Exception as error:
            self._error = self._error or error
        return True

    def _read(self, tensor: int) -> Array:
        head = _Tensor.from_address(tensor)
        if head.type not in _DTYPES:
            raise ValueError(f"a node of type {head.type}, expected F32 or I32")
        raw = np.empty(self._nbytes(tensor), dtype=np.uint8)
        self._get(tensor, raw.ctypes.data, 0, raw.nbytes)
        shape, strides = tuple(head.ne)[::-1], tuple(head.nb)[::-1]
        view: Array = np.ndarray(shape, _DTYPES[head.type], raw.data, 0, strides)
        while view.ndim > 1 and view.shape[0] == 1:
            view = view[0]
        return view.copy()
