"""Types in another process."""

import copy
import pickle

from mopeq_edge.ggml.types import BY_NAME


def test_a_type_stays_the_one_of_its_name() -> None:
    """The code asks ``kind is F32``: a second F32 would be none."""
    for kind in BY_NAME.values():
        assert pickle.loads(pickle.dumps(kind)) is kind
        assert copy.deepcopy(kind) is kind
