"""Differentiable operations, one file per family, forward and backward side by side.

Read them in this order: basic, product, conv, pool, norm, loss. Heavy work is done in passes:
functions dispatched on the type of their first array. The version here is the readable reference;
`minisimclr.kernels` registers faster ones, which are what runs. Everything works without them:
MINISIMCLR_KERNELS=reference leaves them out, as is needed to try out a change here.
"""
