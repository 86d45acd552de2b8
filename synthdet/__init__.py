"""Image synthesis based pretraining for object detection with few boxes.

The names below are what most users need; each is imported when it is first used, so that `import synthdet` costs
nothing. Everything else is in the floors: `synthdet.data`, `objects`, `masks`, `synthesis`, `detection`, `evidence`.
"""
__version__ = "0.6.0"
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .core import UserError, generator
    from .data.batches import batches
    from .data.domains import load_domain as domain
    from .data.settings import DataSource, Labels
    from .detection.detect import detect
    from .detection.detectors import detector
    from .detection.evaluate import evaluate, predict
    from .detection.export import export
    from .detection.settings import Model, Schedule
    from .detection.train import train
    from .evidence.arm import Arm, Mixture, make_arms
    from .evidence.phases import run
    from .evidence.study import Study
    from .evidence.tables import load_rows
    from .masks.settings import Gate, Masks
    from .objects.settings import Objects
    from .settings import override
    from .synthesis.settings import Recipe, Synthesis
    from .synthesis.stream import make_samples as samples

_FACE = {
    'core': ('UserError', 'generator'), 'settings': ('override',),
    'data.batches': ('batches',), 'data.domains': ('load_domain as domain',), 'data.settings': ('DataSource', 'Labels'),
    'objects.settings': ('Objects',), 'masks.settings': ('Gate', 'Masks'),
    'synthesis.settings': ('Recipe', 'Synthesis'), 'synthesis.stream': ('make_samples as samples',),
    'detection.settings': ('Model', 'Schedule'), 'detection.detectors': ('detector',), 'detection.train': ('train',),
    'detection.evaluate': ('evaluate', 'predict'), 'detection.detect': ('detect',), 'detection.export': ('export',),
    'evidence.arm': ('Arm', 'Mixture', 'make_arms'), 'evidence.phases': ('run',), 'evidence.study': ('Study',),
    'evidence.tables': ('load_rows',)}
_HOME = {text.split()[-1]: (module, text.split()[0]) for module, names in _FACE.items() for text in names}
__all__ = ['__version__', *_HOME]


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module 'synthdet' has no attribute {name!r}")
    module, attribute = _HOME[name]
    found = globals()[name] = getattr(import_module(f'synthdet.{module}'), attribute)
    return found


def __dir__(): return sorted({*globals(), *_HOME})
