"""Distill diffusion models into few-step LoRA students, with distribution matching as one reward among equals.

The public names, listed in `__init__.pyi`, load on first use: `import rdm_sdk` imports neither torch nor diffusers.
"""

from rdm_sdk._version import __version__ as __version__
from rdm_sdk.lazy import attach as _attach
from rdm_sdk.quiet import silence_harmless_warnings as _silence_harmless_warnings

_silence_harmless_warnings()
__getattr__, __dir__, __all__ = _attach(__name__, __file__)
