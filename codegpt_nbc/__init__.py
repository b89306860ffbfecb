"""Compress a code-completion model for ordinary CPUs, and measure the cost and the gain.

>>> from codegpt_nbc import load, complete, compress, evaluate

Each is imported when it is first asked for, so that importing the package imports nothing else. They are defined in `codegpt_nbc.runs.api`.

After the import, transformers' automatic classes open every folder with safetensors that this package writes, whichever of the two is
imported first.
"""
import sys

__version__ = "0.3.0"

__all__ = ['load', 'complete', 'compress', 'evaluate']


def __getattr__(name: str):
    if name not in __all__: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'{__name__}.runs.api'), name)


def __dir__(): return sorted([*globals(), *__all__])


# A module of transformers → what registers our classes in it, once it has been imported
_REGISTER = {f'transformers.{theirs}': f'codegpt_nbc.engines.{ours}' for theirs, ours in (
    ('models.auto.configuration_auto', 'auto_config:register_configs'),
    ('models.auto.tokenization_auto', 'auto_config:register_tokenizers'),
    ('models.auto.modeling_auto', 'auto_model:register_models'),
    ('quantizers.auto', 'auto_config:register_quantization'))}


def _register(name: str):
    "Register our classes in that module of transformers, of version 5 on; older ones have other interfaces."
    if int(sys.modules['transformers'].__version__.split('.')[0]) < 5: return
    from pkgutil import resolve_name
    resolve_name(_REGISTER[name])()


class _Loader:
    "The loader of a module of transformers, which registers our classes afterwards."
    def __init__(self, loader): self.loader = loader
    def __getattr__(self, name: str): return getattr(self.loader, name)

    def exec_module(self, module):
        self.loader.exec_module(module)
        _register(module.__name__)


class _Finder:
    "Finds what the other finders find, and gives the modules that we register in their `_Loader`. It costs a look-up an import."
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name not in _REGISTER: return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not cls)
        spec = next(filter(None, found), None)
        if spec: spec.loader = _Loader(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder)
for _name in _REGISTER:
    if _name in sys.modules: _register(_name)
