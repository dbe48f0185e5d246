"""A run on several processes, with PyTorch's own engine: torchrun, DistributedDataParallel, FSDP2.

Every batch is cut into as many equal parts as there are processes. A run on W processes takes the steps of a run on
one: the same samples, the same gate noise, the same mean over all predicted tokens, the same rate in the budget. What
the processes tell each other here are single numbers; parameters and gradients are the engine's affair.
"""
