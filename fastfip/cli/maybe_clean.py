"""Clean images for a command that can do without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from fastfip.cli import options as o
from fastfip.cli.errors import fail

if TYPE_CHECKING:
    from fastfip.cli.triggers import ImageReader
    from fastfip.data.images import ImageSet

__all__ = ["MaybeClean"]


@dataclass
class MaybeClean(o.Group):
    """Clean images and how many of them, or the shape of images in their place."""

    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DIR|ZIP|NPZ",
            help="clean images: a folder with a folder for each class, a zip of it (FILE.zip[:train]), or "
            "FILE.npz[:images,labels]",
            show_default="none; then give --input-shape",
        ),
    ] = None
    limit: o.Limit = None
    per_class: o.PerClass = None
    input_shape: Annotated[
        str | None,
        typer.Option(
            "--input-shape", metavar="C,H,W", help="shape of one input, for runs without --data, e.g. 3,32,32"
        ),
    ] = None

    def check(self) -> tuple[int, int, int] | None:
        """Return the shape of the inputs, if it is given; what goes only with images, or only without, is refused."""
        counts = {"--limit": self.limit, "--per-class": self.per_class}
        for name, given in counts.items() if self.data is None else ():
            if given is not None:
                raise fail(f"{name} needs --data")
        if self.data is not None and self.input_shape is not None:
            raise fail("--input-shape is only for runs without --data: leave it out, the images have a shape")
        if self.input_shape is None:
            if self.data is None:
                raise fail(
                    "--data is missing: give clean images; if you have none, give the shape of an input, e.g. "
                    "--input-shape 3,32,32"
                )
            return None
        sizes = self.input_shape.replace("x", ",").split(",")
        if len(sizes) != 3 or not all(size.strip().isdecimal() and int(size) for size in sizes):
            raise fail(f"--input-shape {self.input_shape}: give channels, height and width, e.g. 3,32,32")
        channels, height, width = map(int, sizes)
        return channels, height, width

    def load(self, how: ImageReader, seed: int) -> ImageSet | None:
        """Return the images that are used, None without any."""
        return None if self.data is None else o.Clean(self.data, self.limit, self.per_class).load(how, seed)
