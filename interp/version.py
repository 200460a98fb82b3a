"""The version, in one place: the build, `interp.__version__` and the cards on disk read it from here."""

__version__ = "0.1.0"
