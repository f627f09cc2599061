"""Gloo, the transport of torch.distributed on CPU: from bytes of its connections to each rank's own gradient.

    framing -> network -> (collect, ring, inversion) -> job -> reader

A sub-package of its own, as there is one noun too many for the folder above.
"""
