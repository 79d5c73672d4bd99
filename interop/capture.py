"""The former place of `interop.hf.capture`."""

import warnings

from interop.hf.capture import Capture as Capture
from interop.hf.capture import capture as capture

warnings.warn("interop.capture has moved to interop.hf.capture", DeprecationWarning, stacklevel=2)
