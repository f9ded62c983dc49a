"""The orders in which groups work on batches, in one process and over several."""
