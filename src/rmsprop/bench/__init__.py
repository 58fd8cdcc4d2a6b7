"""`rmsprop bench`: the time of a step beside the optimizers of torch, on a CPU and on a GPU. Imports optimizer."""
