"""Values that a file may hold where another kind was expected: in JSON also nothing, in GGUF always something."""

from hypothesis import strategies as st

_PLAIN = st.booleans() | st.integers(-3, 300) | st.just(10**400) | st.floats() | st.text(max_size=3)
GIVEN = st.recursive(
    _PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
JSON = st.none() | GIVEN
