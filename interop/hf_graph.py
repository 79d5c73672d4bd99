"""The former place of `interop.hf.decoding_graphs`."""

import warnings

from interop.hf.decoding_graphs import decoding_graphs as decoding_graphs

warnings.warn("interop.hf_graph has moved to interop.hf.decoding_graphs", DeprecationWarning, stacklevel=2)
