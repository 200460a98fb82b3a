"""The one error of this package: something that cannot be fitted, combined or applied as asked."""

from __future__ import annotations


class SteeringError(ValueError):
    """Names the argument, its value, what was expected, and the mend."""
