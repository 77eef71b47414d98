"""What the starter can generate, and its glyphs: one atlas, rendered from Noto Color Emoji.

The atlas ships with the package, so training needs no font on the machine. To render it again:
`python -m ddpo.starter.glyphs /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf`.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ATLAS_PATH = Path(__file__).parent / "glyphs.png"
"""One row of `CELL_PX` square RGBA cells, in the order of `GLYPHS`."""

CELL_PX = 136
STRIKE_PX = 109
"""The only size that the bitmaps of Noto Color Emoji exist in."""

_ANIMALS: dict[str, str] = {
    "cat": "\U0001f408",
    "dog": "\U0001f415",
    "horse": "\U0001f40e",
    "monkey": "\U0001f412",
    "rabbit": "\U0001f407",
    "zebra": "\U0001f993",
    "spider": "\U0001f577",
    "bird": "\U0001f426",
    "sheep": "\U0001f411",
    "deer": "\U0001f98c",
    "cow": "\U0001f404",
    "goat": "\U0001f410",
    "lion": "\U0001f981",
    "tiger": "\U0001f405",
    "bear": "\U0001f43b",
    "raccoon": "\U0001f99d",
    "fox": "\U0001f98a",
    "wolf": "\U0001f43a",
    "lizard": "\U0001f98e",
    "beetle": "\U0001fab2",
    "ant": "\U0001f41c",
    "butterfly": "\U0001f98b",
    "fish": "\U0001f41f",
    "shark": "\U0001f988",
    "whale": "\U0001f40b",
    "dolphin": "\U0001f42c",
    "squirrel": "\U0001f43f",
    "mouse": "\U0001f401",
    "rat": "\U0001f400",
    "snake": "\U0001f40d",
    "turtle": "\U0001f422",
    "frog": "\U0001f438",
    "chicken": "\U0001f414",
    "duck": "\U0001f986",
    "goose": "\U0001fabf",
    "bee": "\U0001f41d",
    "pig": "\U0001f416",
    "turkey": "\U0001f983",
    "fly": "\U0001fab0",
    "llama": "\U0001f999",
    "camel": "\U0001f42a",
    "bat": "\U0001f987",
    "gorilla": "\U0001f98d",
    "hedgehog": "\U0001f994",
    "kangaroo": "\U0001f998",
}
_ACTIVITIES: dict[str, str] = {
    "riding a bike": "\U0001f6b2",
    "playing chess": "\u265f",
    "washing the dishes": "\U0001f37d",
}
_OTHERS: dict[str, str] = {
    "elephant": "\U0001f418",
    "giraffe": "\U0001f992",
    "octopus": "\U0001f419",
    "penguin": "\U0001f427",
    "dragon": "\U0001f409",
    "unicorn": "\U0001f984",
    "owl": "\U0001f989",
    "parrot": "\U0001f99c",
    "crocodile": "\U0001f40a",
    "rhinoceros": "\U0001f98f",
    "panda": "\U0001f43c",
    "swan": "\U0001f9a2",
    "apple": "\U0001f34e",
    "banana": "\U0001f34c",
    "car": "\U0001f697",
    "house": "\U0001f3e0",
    "tree": "\U0001f333",
    "clock": "\u23f0",
    "guitar": "\U0001f3b8",
    "umbrella": "\u2602",
    "balloon": "\U0001f388",
    "mushroom": "\U0001f344",
    "rocket": "\U0001f680",
    "sunflower": "\U0001f33b",
}

ANIMALS: tuple[str, ...] = tuple(_ANIMALS)
"""The 45 animals of the DDPO paper (Black et al. 2023)."""

ACTIVITIES: tuple[str, ...] = tuple(_ACTIVITIES)
"""The paper's three activities, each shown by an object: a bike, a pawn, a plate."""

OTHERS: tuple[str, ...] = tuple(_OTHERS)
"""12 other animals and 12 objects, which the model knows but no animal task prompts."""

GLYPHS: dict[str, str] = {**_ANIMALS, **_ACTIVITIES, **_OTHERS}
"""Code point of each name."""


def draw_atlas(font_path: Path) -> Image.Image:
    """Render every glyph into one row of cells.

    Args:
        font_path: Noto Color Emoji as a TrueType file.

    Returns:
        RGBA image of size [72 * `CELL_PX`, `CELL_PX`].

    Raises:
        ValueError: The font has no glyph for a name.
    """
    font = ImageFont.truetype(str(font_path), STRIKE_PX)
    atlas = Image.new("RGBA", (CELL_PX * len(GLYPHS), CELL_PX))
    for column, (name, character) in enumerate(GLYPHS.items()):
        canvas = Image.new("RGBA", (2 * CELL_PX, 2 * CELL_PX))
        ImageDraw.Draw(canvas).text((8, 8), character, font=font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise ValueError(
                f"{font_path} has no glyph for {name!r} (U+{ord(character):X}); "
                "use a newer Noto Color Emoji"
            )
        atlas.paste(canvas.crop(box), (column * CELL_PX, 0))
    return atlas


@cache
def glyph(name: str) -> Image.Image:
    """Return a glyph, cropped to its bounding box: RGBA, longest side 90 to 136 pixels."""
    column = tuple(GLYPHS).index(name)
    with Image.open(ATLAS_PATH) as atlas:
        cell = atlas.crop((column * CELL_PX, 0, (column + 1) * CELL_PX, CELL_PX))
    return cell.crop(cell.getbbox())


if __name__ == "__main__":
    draw_atlas(Path(sys.argv[1])).save(ATLAS_PATH, optimize=True)
