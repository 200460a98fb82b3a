"""What goes wrong in probing, said so that it can be mended."""


class ProbeError(ValueError):
    """Data or settings that a probe cannot work with."""


class ProbeWarning(UserWarning):
    """A result that should be read with care."""
