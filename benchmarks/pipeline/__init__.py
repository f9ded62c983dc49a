"""Decoupled groups beside back-propagation over pipelines, on two CPU processes."""
