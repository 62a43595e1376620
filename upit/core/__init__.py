"""What knows neither a model nor the method: files, tensors, processes, progress."""
