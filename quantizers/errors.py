"""What a quantizer refuses."""


class QuantizationError(ValueError):
    """A tensor or a setting that cannot be quantized: names the subject, the value and the rule."""


class NumericalError(QuantizationError):
    """Numbers that a method cannot work with, such as a Hessian that is not positive definite."""


class NoKernelError(QuantizationError):
    """A linear that no operator of the device computes as it is stored."""
