"""Importing loud libraries without passing their remarks on to the user."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

_LOUD = ("torchao", "torch.utils._pytree", "diffusers", "transformers")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that is said inside reaches the user; loggers, streams and filters come back as they were.

    Importing torchao, which diffusers does, reports every GPU library it did not find. Errors are raised as ever.
    """
    levels = {name: logging.getLogger(name).level for name in _LOUD}
    try:
        for name in _LOUD:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
