"""Every error that the library raises on purpose, as one tree.

ClError
├── ConfigError (ValueError)        a parameter is out of range, or a name is unknown
│   └── CompositionError            strategies that cannot work together
├── DataError (ValueError)          a row or a data set cannot be used
├── FisherError (RuntimeError)      importance cannot be estimated here
├── StrategyError (RuntimeError)    a hook was called in the wrong order or not at all
├── TrainingDivergedError (RuntimeError)  the loss is no longer a finite number
├── BackendError (RuntimeError)     a parallel backend is unknown or cannot do this
├── ExportError (RuntimeError)      a figure cannot be drawn as an image here
└── StateError (RuntimeError)       stored state does not fit: schema, adapter generation, checksum
    └── StaleVersionError           a write was based on a version that is no longer the newest

Each takes one message and nothing else, so that it survives pickling between processes.
"""

from __future__ import annotations


class ClError(Exception):
    """Base of all errors that clcore raises on purpose."""


class ConfigError(ClError, ValueError):
    """A parameter is out of range, or a name is unknown."""


class CompositionError(ConfigError):
    """Strategies that cannot work together."""


class DataError(ClError, ValueError):
    """A row or a data set cannot be used."""


class FisherError(ClError, RuntimeError):
    """Importance cannot be estimated here."""


class StrategyError(ClError, RuntimeError):
    """A hook was called in the wrong order or not at all."""


class TrainingDivergedError(ClError, RuntimeError):
    """The loss is no longer a finite number."""


class BackendError(ClError, RuntimeError):
    """A parallel backend is unknown or cannot do what was asked."""


class ExportError(ClError, RuntimeError):
    """A figure cannot be drawn as an image here."""


class StateError(ClError, RuntimeError):
    """Stored state does not fit: schema, adapter generation or checksum."""


class StaleVersionError(StateError):
    """A write was based on a version that is no longer the newest."""
