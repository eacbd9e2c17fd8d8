"""Errors that fastfip raises on purpose. Each says in one line what is wrong and what to do about it."""


class FastFIPError(Exception):
    """Base of every error that fastfip raises on purpose."""


class DataError(FastFIPError, ValueError):
    """The data cannot be used as given: empty, wrong dtype, labels out of range ..."""


class ModelError(FastFIPError, ValueError):
    """The model cannot be used as given: frozen, BatchNorm in train mode, no logits ..."""


class ConfigError(FastFIPError, ValueError):
    """A setting is unknown or out of its range."""


class CheckpointError(FastFIPError, ValueError):
    """A checkpoint file is refused, or does not fit the model."""


class BackendError(FastFIPError, RuntimeError):
    """A backend was asked for by name and cannot run here."""
