"""The former place of `interop.torch.dlpack`."""

import warnings

from interop.torch.dlpack import to_jax as to_jax
from interop.torch.dlpack import to_torch as to_torch

warnings.warn("interop.dlpack has moved to interop.torch.dlpack", DeprecationWarning, stacklevel=2)
