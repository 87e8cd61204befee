"""For every test."""

import signal

import torch

# Several torch threads in one process crawl while other processes use the same cores, as the cluster tests' do.
torch.set_num_threads(1)

# Who starts the tests in a shell's background has them ignore Ctrl-C, and so would every command that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
