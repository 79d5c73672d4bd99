"""The former place of `interop.torch.cache`."""

import warnings

from interop.torch.cache import TorchCache as TorchCache

warnings.warn("interop.torch_cache has moved to interop.torch.cache", DeprecationWarning, stacklevel=2)
