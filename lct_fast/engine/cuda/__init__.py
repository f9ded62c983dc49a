"""Streams, rings of slots and the gate that keeps NaN and Inf out of the weights, on a device."""
