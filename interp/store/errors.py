"""What can go wrong with a dataset on disk, each with its own name, so that callers can tell the cases apart."""

from __future__ import annotations


class StoreError(ValueError):
    """A dataset that cannot be written or read as asked; the message says why and what to do."""


class NotADataset(StoreError):
    """The directory holds no activation dataset, or one that another writer has not finished."""


class Mismatch(StoreError):
    """Resuming with another model, other texts, sites or settings than those the dataset was begun with."""


class Locked(StoreError):
    """Another process is writing to this directory."""


class Corrupt(StoreError):
    """A file of the dataset is missing, truncated or not what was written."""


class DiskError(OSError):
    """The disk is full, read-only or refuses us; keeps the `errno` of the system's own error."""
