"""How fast Drover is on this machine, beside llama.cpp and vLLM: `python -m bench --help`.

Importing this room's `worker` and `peers` takes the standard library only: they also run in the peers' environments.
"""
