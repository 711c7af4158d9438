"""Expert groups, version 1: stacks whose experts have different types. See docs/expert-groups.md."""
