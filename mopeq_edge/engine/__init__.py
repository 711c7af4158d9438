"""Where the tasks of a stage run: in this process, or on the machines of a Ray cluster."""
