"""For authors of plugins: the contract kits, batches to try rewards on, and tiny offline models.

The names, listed in `__init__.pyi`, load on first use: a reward's tests import neither diffusers nor PEFT.
"""

from rdm_sdk.lazy import attach as _attach

__getattr__, __dir__, __all__ = _attach(__name__, __file__)
