"""Settings every test shares."""

import torch

# The tests' tensors are tiny: more threads only cost time, and change the order of sums.
torch.set_num_threads(1)
