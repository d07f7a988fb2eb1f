"""The parts of aot_check.py: training, decoding and serving, and what they share."""

GIB = 2**30
