"""Our lines in llama.cpp: the patches, and what puts them into a source tree.

The ``*.patch`` files beside this module are unified diffs against llama.cpp's root. They hold the least context that
places them, so `fit` asks more of a tree than ``git apply`` does.
"""
