"""The former place of `interop.hf.calibrate`."""

import warnings

from interop.hf.calibrate import calibrate as calibrate
from interop.hf.calibrate import main as main

warnings.warn("interop.calibrate has moved to interop.hf.calibrate", DeprecationWarning, stacklevel=2)

if __name__ == "__main__":
    main("python -m interop.calibrate")
