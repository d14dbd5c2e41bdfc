"""Workers and the devices they own. Knows nothing of quantization; `ray` is imported in this package alone."""
