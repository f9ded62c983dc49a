"""What is kept longer than a batch: replay buffers, state of samples, files written behind training."""
