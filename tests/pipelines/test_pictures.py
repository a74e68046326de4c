from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dit_accel import OutputCacheConfig, TokenCacheConfig
from dit_accel.pipelines.methods import describe
from dit_accel.pipelines.pictures import (
    MANIFEST,
    as_shown,
    check_folder,
    psnr,
    psnr_text,
    read_record,
    rgb,
    save,
    side_by_side,
    stem,
    unused,
    write_atomically,
)


def noise_image(seed: int, size: tuple[int, int] = (20, 12)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_psnr_of_a_constant_difference():
    a = Image.new("RGB", (8, 8), (100, 100, 100))
    b = Image.new("RGB", (8, 8), (110, 110, 110))
    assert psnr(a, b) == pytest.approx(20 * math.log10(255 / 10))


def test_psnr_does_not_wrap_around():
    black, white = Image.new("RGB", (4, 4), "black"), Image.new("RGB", (4, 4), "white")
    assert psnr(black, white) == pytest.approx(0) == psnr(white, black)


def test_identical_pictures_are_called_so():
    assert psnr(noise_image(0), noise_image(0)) == math.inf
    assert psnr_text(math.inf) == "identical"


def test_sixteen_bits_are_read_in_full():
    levels = np.array([[0, 128, 256, 257], [32768, 65535, 12850, 1]], dtype=np.uint16)
    assert np.asarray(as_shown(Image.fromarray(levels))).tolist() == [[0, 0, 1, 1], [128, 255, 50, 0]]
    assert rgb(Image.fromarray(levels))[1, 1].tolist() == [255] * 3
    for dtype in (np.int32, np.float32):
        with pytest.raises(ValueError, match="32 bits"):
            rgb(Image.fromarray(levels.astype(dtype)))


def test_transparent_places_are_white():
    colors = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)
    alpha = colors[..., 3:] / 255
    expected = colors[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(rgb(Image.fromarray(colors)) - expected).max() <= 1
    image = noise_image(0).convert("P")
    image.info["transparency"] = image.getpixel((3, 4))
    shown = as_shown(image)
    assert shown.mode == "RGB" and shown.getpixel((3, 4)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_by_their_exif_data(tmp_path, orientation):
    """By the definition: which edge of the stored picture is the top and which the left of the shown one."""
    image, exif = noise_image(0), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    stored = np.asarray(image)
    flips = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1]}
    turns = {n + 4: np.swapaxes(flips[m], 0, 1) for n, m in ((1, 1), (2, 4), (3, 3), (4, 2))}
    assert np.array_equal(rgb(Image.open(tmp_path / "a.png")), (flips | turns)[orientation])


def test_other_pictures_stay_what_they_are():
    for mode in ("RGB", "L", "P", "1", "CMYK"):
        image = noise_image(0).convert(mode)
        assert as_shown(image) is image


def test_save_puts_the_record_into_the_png_and_beside_it(tmp_path):
    record = {"prompt": "rød æble 🍎", "steps": 3, "cache": {"interval": 4}, "work": None}
    path = tmp_path / "new" / "a.png"
    save(noise_image(0), path, record)
    image = Image.open(path)
    assert np.array_equal(np.asarray(image), np.asarray(noise_image(0)))
    assert image.text["prompt"] == record["prompt"]
    assert {key: json.loads(image.text[key]) for key in ("steps", "cache", "work")} == {
        k: record[k] for k in ("steps", "cache", "work")
    }
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == record


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    if broken == "replace":
        monkeypatch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, b"new")
    else:
        with pytest.raises(TypeError):
            write_atomically(path, "not bytes")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_is_there_is_only_replaced_if_asked(tmp_path, monkeypatch, links):
    if not links:  # as on FAT

        def refuse(*_):
            raise PermissionError(errno.EPERM, "no hard links")

        monkeypatch.setattr(os, "link", refuse)
    write_atomically(tmp_path / "a.png", b"first", replace=False)
    with pytest.raises(FileExistsError, match="a.png"):
        write_atomically(tmp_path / "a.png", b"second", replace=False)
    assert (tmp_path / "a.png").read_bytes() == b"first"
    write_atomically(tmp_path / "a.png", b"third")
    assert (tmp_path / "a.png").read_bytes() == b"third" and os.listdir(tmp_path) == ["a.png"]


def test_a_folder_is_checked_without_a_trace(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for wrong in ("file", "file/below", "link", "link/below", "x" * 300):
        with pytest.raises(ValueError, match="cannot be the folder of pictures"):
            check_folder(tmp_path / wrong)
    monkeypatch.chdir(tmp_path)
    for right in (".", "new", "new/deep", tmp_path / "new"):
        check_folder(Path(right))
    assert sorted(os.listdir()) == ["file", "link"]

    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match="new cannot be .*: Read-only file system"):
        check_folder(Path("new"))


def test_a_record_comes_back_from_both_files(tmp_path):
    record = {"prompt": "3", "pipeline": "null", "method": "none", "dtype": "float32", "steps": 3, "cache": None, "seed": 2**60}
    save(noise_image(0), tmp_path / "a.png", record)
    assert read_record(tmp_path / "a.png") == read_record(tmp_path / "a.json") == record
    (tmp_path / "list.json").write_text("[]")
    for name in ("list.json", "manifest.jsonl"):
        with pytest.raises(ValueError, match=f"{name} holds no settings"):
            read_record(tmp_path / name)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named_by_the_manifest_too(tmp_path):
    (tmp_path / MANIFEST).symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '.*{MANIFEST}'"):
        save(noise_image(0), tmp_path / "a.png", {"prompt": "a"})
    Image.open(tmp_path / "a.png").load()


def test_files_have_the_usual_permissions(tmp_path):
    write_atomically(tmp_path / "ours", b"")
    (tmp_path / "usual").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_names(tmp_path):
    assert stem("Red apple, 3d style!", 7) == "red-apple-3d-style-seed7"
    taken: set[str] = set()
    (tmp_path / "a-2.json").write_text("")
    assert [unused(tmp_path, "a", taken) for _ in range(3)] == ["a", "a-3", "a-4"]
    assert unused(None, "a-2", taken) == "a-2" and unused(None, "a", taken) == "a-5", "in memory alone"
    (tmp_path / "b-full.png").write_text("")
    assert unused(tmp_path, "b", set()) == "b" and unused(tmp_path, "b", set(), ("", "-full")) == "b-2"


@settings(deadline=None, max_examples=50)
@given(st.text(), st.integers(0, 2**63 - 1))
def test_a_name_is_one_short_file_name(prompt, seed):
    name = stem(prompt, seed)
    assert name == os.path.basename(name) and not name.startswith((".", "-")) and len(name.encode()) < 100


def test_side_by_side_shows_both_pictures_enlarged_and_labels_them():
    a, b = noise_image(0), noise_image(1)
    page = side_by_side("a very long prompt " * 10, [(a, ["in full", "1 s"]), (b, ["cached"])])
    pixels = np.asarray(page)
    factor = -(-320 // 12)
    for picture in (a, b):
        large = np.asarray(picture).repeat(factor, 0).repeat(factor, 1)
        row, column = large.shape[:2]
        windows = np.lib.stride_tricks.sliding_window_view(pixels[:, :, 0], (1, column))[:, :, 0]
        assert (windows == large[0, :, 0]).all(-1).any(), "the picture is not on the page"
        assert page.height > row
    unlabelled = np.asarray(side_by_side("a very long prompt " * 10, [(a, ["", ""]), (b, [""])]))
    assert (pixels != unlabelled).any()


@pytest.mark.parametrize(
    "config, caption",
    [
        (None, "uncached"),
        (TokenCacheConfig(interval=5, cache_ratio=0.9, selector="drift"), "N=5 R=0.9 drift"),
        (OutputCacheConfig(interval=4, order=2), "N=4, polynomial 2"),
        (OutputCacheConfig(full_steps=(0, 2, 5), how="taylor"), "3 full steps, taylor 1"),
        (OutputCacheConfig(full_steps=(0, 2, 5), sampler_steps=8), "3 full steps of 8, polynomial 1"),
        # Where nothing is forecast, nothing is said of forecasts.
        (OutputCacheConfig(full_steps=(0, 1, 2), sampler_steps=3, merged_steps=(0,)), "3 steps, early steps merged"),
        (OutputCacheConfig(interval=1, sampler_steps=7), "7 steps"),
        (OutputCacheConfig(interval=1, sampler_steps=7, guidance_steps=2), "7 steps, polynomial 1"),
    ],
)
def test_a_caption_says_which_steps_are_full_and_how_the_rest_is_made(config, caption):
    assert describe(config) == caption
