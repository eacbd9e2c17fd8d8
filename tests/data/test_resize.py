"""How pictures and arrays are brought to a size."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastfip.data.images import load
from fastfip.data.resize import INTERPOLATIONS, Fit
from fastfip.data.scaling import Pixels
from fastfip.errors import ConfigError, DataError


def picture(height, width):
    rows, columns = np.mgrid[:height, :width]
    smooth = (
        127
        + 60 * np.sin(rows / 5)[..., None]
        + 60 * np.cos(columns / 7 + np.arange(3)[:, None, None]).transpose(1, 2, 0)
    )
    return Image.fromarray(smooth.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("height, width", [(40, 60), (60, 40), (32, 32)])
def test_the_shorter_side_is_brought_to_its_length_and_the_middle_cut_out(height, width):
    image, fit = picture(height, width), Fit((24, 20), 30, "bicubic")
    long = int(30 * max(height, width) / min(height, width))
    size = (30, long) if height <= width else (long, 30)
    whole = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    top, left = round((size[0] - 24) / 2), round((size[1] - 20) / 2)
    want = np.asarray(whole)[top : top + 24, left : left + 20]
    assert np.array_equal(np.asarray(fit.picture(image)), want)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("resize", [None, 30, (36, 28)], ids=str)
def test_arrays_and_pictures_come_out_alike(resize, interpolation):
    image, fit = picture(40, 50), Fit((24, 20), resize, interpolation)
    here = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    there = torch.from_numpy(np.array(fit.picture(image))).permute(2, 0, 1)[None].float() / 255
    out = fit.batch(here)
    assert out.shape == (1, 3, 24, 20)
    assert float((out - there).abs().max()) < 0.01  # pillow rounds to whole numbers twice


def test_no_filter_leaves_the_range_of_the_images():
    x = (torch.rand(2, 3, 9, 9) > 0.5).float()
    for interpolation in ("bicubic", "lanczos"):
        out = Fit((20, 20), None, interpolation).batch(x)
        assert float(out.min()) >= 0 and float(out.max()) <= 1


def test_files_zips_and_arrays_of_one_folder_are_made_alike(tmp_path):
    import zipfile

    pixels = Pixels(size=(16, 16), resize=20, interpolation="bicubic")
    for label in range(2):
        (tmp_path / "d" / str(label)).mkdir(parents=True)
        picture(30 + label, 40).save(tmp_path / "d" / str(label) / "a.png")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for label in range(2):
            archive.write(tmp_path / "d" / str(label) / "a.png", f"{label}/a.png")
    files = load(tmp_path / "d", pixels=pixels).batch([0, 1])[0]
    assert files.shape == (2, 3, 16, 16)
    assert torch.equal(load(tmp_path / "d.zip", pixels=pixels).batch([0, 1])[0], files)
    np.savez(tmp_path / "a.npz", x=np.array(picture(30, 40))[None], y=np.array([0]))
    torch.testing.assert_close(load(tmp_path / "a.npz", pixels=pixels).batch([0])[0], files[:1], atol=0.01, rtol=0)


def test_what_cannot_be_cut_out_or_is_no_filter_is_refused():
    with pytest.raises(DataError, match="the middle of 30 x 30 is larger than the image, which is 20 x 25"):
        Fit((30, 30), (20, 25)).batch(torch.rand(1, 3, 40, 50))
    with pytest.raises(ConfigError, match="interpolation='cubic': must be one of nearest"):
        Fit((3, 3), None, "cubic")
    with pytest.raises(ConfigError, match="interpolation='cubic'"):
        Pixels(interpolation="cubic")


def test_a_result_says_who_else_than_the_user_said_how_images_are_made():
    assert Pixels((0.5,), (0.5,), (8, 8)).words() == []
    (said,) = Pixels((0.5,), (0.5,), (8, 8), resize=9, interpolation="bicubic", of="timm:x\x1b[2J").words()
    assert said.startswith("images are made as timm:x?[2J says: shorter side 9, the middle 8 x 8 of it (bicubic), ")
    assert "--size, --mean, --std" in said
    assert Pixels(of="timm:x", size=(8, 8)).to_dict()["of"] == "timm:x" and "of" not in Pixels(size=(8, 8)).to_dict()
