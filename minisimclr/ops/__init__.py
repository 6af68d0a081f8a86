"""Differentiable operations, one file per family, forward and backward side by side.

Heavy work is done in passes: functions dispatched on the type of their first array. The version
here is the readable reference; `minisimclr.kernels` registers faster ones, and everything works
without them.
"""
