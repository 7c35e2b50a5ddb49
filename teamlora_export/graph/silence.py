"""Keeps what exporters say to their own developers out of our output."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

_NOISY_LOGGERS = ("torch.onnx", "transformers", "onnxscript", "torch.export", "torch._subclasses.fake_tensor")


@contextmanager
def silenced() -> Iterator[None]:
    """Nothing is printed or logged inside of the block; errors still come through as exceptions."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
