"""lct_fast: train deep networks on many devices without backward locking."""

__version__ = "0.1.0"
