"""The systems beside Drover, each run by an interpreter with its own packages: see `make bench-peers`."""
