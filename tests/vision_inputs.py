"""Images and videos for tiny vision-language models: arguments of `generate`, and the tokens that stand for them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

IMAGE, VIDEO, START = 250, 251, 252
"""Tokens that stand for parts of an image and of a video, and the one in front of them in some families."""

SEEDED = torch.Generator()
"""Where pixels come from; seed it first."""


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=SEEDED)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a family is asked: the number of tokens of the image or video, and the other arguments of `generate`."""

    tokens: int
    given: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """A tiny model of a family.

    Attributes:
        config: Arguments of `AutoConfig.for_model`.
        image: The image.
        video: The video; None if the family takes none.
        start: Token in front of the image or video; None for none.
        types: Type of the tokens of image and video; None if the family takes no types.
        types_name: Name of the argument that gives the types of tokens.
    """

    config: dict[str, Any]
    image: Callable[[], Asked]
    video: Callable[[], Asked] | None = None
    start: int | None = None
    types: tuple[int, int] | None = None
    types_name: str = "mm_token_type_ids"


def pixels(tokens: int, **more: Any) -> Callable[[], Asked]:
    return lambda: Asked(tokens, dict(pixel_values=noise(1, 3, 56, 56)) | more)


def frames(tokens: int, count: int = 3, name: str = "pixel_values_videos") -> Callable[[], Asked]:
    return lambda: Asked(tokens, {name: noise(1, count, 3, 56, 56)})


def patches(kind: str, times: int, *, size: int = 3 * 2 * 14 * 14, merged: int = 4) -> Callable[[], Asked]:
    """Patches of 4 x 4 per two frames, four of which are one token."""
    names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    return lambda: Asked(
        times * 16 // merged, {names[0]: noise(times * 16, size), names[1]: torch.tensor([[times, 4, 4]])}
    )


def molmo2(kind: str, times: int) -> Callable[[], Asked]:
    """4 x 4 patches per frame, of which 2 x 2 are pooled into one token."""
    pooled = torch.arange(16).view(4, 4).unfold(0, 2, 2).unfold(1, 2, 2).reshape(4, 4)
    pooling = torch.cat([pooled + 16 * i for i in range(times)])
    names = (
        ("pixel_values", "image_token_pooling") if kind == "image" else ("pixel_values_videos", "video_token_pooling")
    )
    grids = (
        {"image_grids": [[2, 2, 0, 0]], "image_num_crops": [1]} if kind == "image" else {"video_grids": [[times, 2, 2]]}
    )
    tensors = {name: torch.tensor(value) for name, value in grids.items()}
    return lambda: Asked(4 * times, {names[0]: noise(times, 16, 588), names[1]: pooling} | tensors)


def prompt(family: Family, asked: Asked, kind: str) -> dict[str, Any]:
    """Arguments of `generate`: some text, the image or video, more text."""
    token = VIDEO if kind == "video" and VIDEO in family.config.values() else IMAGE
    front = [5, 6] if family.start is None else [5, 6, family.start]
    ids = torch.tensor([front + [token] * asked.tokens + [7, 8, 9, 10, 11]])
    given = dict(input_ids=ids, attention_mask=torch.ones_like(ids)) | asked.given
    if family.types is not None:
        given[family.types_name] = (ids == token).long() * family.types[kind == "video"]
    return given
