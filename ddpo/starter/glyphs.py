"""The 45 animals and their glyphs, cut once from Noto Color Emoji into one atlas.

The atlas ships with the package, so training needs no font on the machine. To cut it again:
`python -m ddpo.starter.glyphs /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf`.
"""

import sys
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ATLAS_PATH = Path(__file__).parent / "glyphs.png"
"""One row of `CELL_PX` square RGBA cells, in the order of `GLYPHS`."""

CELL_PX = 136
STRIKE_PX = 109
"""The only size that the bitmaps of Noto Color Emoji exist in."""

GLYPHS: dict[str, str] = {
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
"""The animals of the DDPO paper (Black et al. 2023) and their code points."""

ANIMALS: tuple[str, ...] = tuple(GLYPHS)


def draw_atlas(font_path: Path) -> Image.Image:
    """Draws every glyph into one row of cells.

    Args:
        font_path: Noto Color Emoji as a TrueType file.

    Returns:
        RGBA picture of size [45 * `CELL_PX`, `CELL_PX`].

    Raises:
        ValueError: the font draws nothing for an animal.
    """
    font = ImageFont.truetype(str(font_path), STRIKE_PX)
    atlas = Image.new("RGBA", (CELL_PX * len(ANIMALS), CELL_PX))
    for column, (animal, character) in enumerate(GLYPHS.items()):
        canvas = Image.new("RGBA", (2 * CELL_PX, 2 * CELL_PX))
        ImageDraw.Draw(canvas).text((8, 8), character, font=font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise ValueError(
                f"{font_path} draws nothing for {animal!r} (U+{ord(character):X}); "
                "give a newer Noto Color Emoji"
            )
        atlas.paste(canvas.crop(box), (column * CELL_PX, 0))
    return atlas


@cache
def glyph(animal: str) -> Image.Image:
    """Returns an animal's glyph, cropped to what is drawn: RGBA, longest side 90 to 127 pixels."""
    column = ANIMALS.index(animal)
    with Image.open(ATLAS_PATH) as atlas:
        cell = atlas.crop((column * CELL_PX, 0, (column + 1) * CELL_PX, CELL_PX))
    return cell.crop(cell.getbbox())


if __name__ == "__main__":
    draw_atlas(Path(sys.argv[1])).save(ATLAS_PATH, optimize=True)
