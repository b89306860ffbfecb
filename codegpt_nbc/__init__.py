"""Compress a code-completion model for ordinary CPUs, and measure the cost and the gain.

>>> from codegpt_nbc import load, complete, compress, evaluate

Each is imported when it is first asked for, so that importing the package imports nothing else. They are defined in `codegpt_nbc.runs.api`.
"""
__version__ = "0.3.0"

__all__ = ['load', 'complete', 'compress', 'evaluate']


def __getattr__(name: str):
    if name not in __all__: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'{__name__}.runs.api'), name)


def __dir__(): return sorted([*globals(), *__all__])
