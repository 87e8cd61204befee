"""For every test."""

import torch

# Several torch threads in one process crawl while other processes use the same cores, as the cluster tests' do.
torch.set_num_threads(1)
