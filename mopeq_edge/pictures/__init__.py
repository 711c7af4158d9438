"""Pictures of plans and files; drawing needs matplotlib, the extra ``pictures``."""
