"""What a quantizer refuses."""


class QuantizationError(ValueError):
    """A tensor or a setting that cannot be quantized: names the subject, the value and the rule."""
