"""Text that ships with the package, so that no evaluation needs a download."""

import lzma
from importlib import resources


def persuasion() -> str:
    r"""Returns *Persuasion* by Jane Austen (1818, public domain), 24 chapters, 464,284 characters.

    One paragraph per line with single spaces, a blank line between paragraphs; chapter headings are paragraphs.

    Returns:
        The novel without its title page.

    Raises:
        FileNotFoundError: if the package was installed without its data files.

    Example:
        >>> persuasion()[:41]
        'Chapter 1\n\nSir Walter Elliot, of Kellynch'
    """
    packed = resources.files(__name__).joinpath("persuasion.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("utf-8")
