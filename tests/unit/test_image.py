"""Every kind of image file becomes the same upright 8-bit pixels, or is refused by its name."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdad_dist.data.image import (
    MAX_PIXELS,
    decode_image,
    decode_mask,
    load_image,
    resize_image,
    resize_mask,
    resized,
)
from kdad_dist.errors import DataError
from tests.helpers import header_of_png, square_mask, texture

ORIENTATION = 0x0112


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def gradient() -> np.ndarray:
    """Smooth, so that lossy formats stay close to it, and unlike itself when turned."""
    y, x = np.mgrid[:60, :80]
    return np.stack([x * 3, y * 4, (x + y) // 2], axis=-1).astype(np.uint8)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
def test_a_lossless_format_gives_its_pixels(file_format):
    data = encode(Image.fromarray(texture(0)), file_format)
    np.testing.assert_array_equal(decode_image(data, "x"), texture(0))


@pytest.mark.parametrize(
    ("file_format", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {"quality": 95})],
)
def test_a_lossy_format_comes_close(file_format, options):
    data = encode(Image.fromarray(gradient()), file_format, **options)
    error = np.abs(decode_image(data, "x").astype(int) - gradient())
    assert error.mean() < 4


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(file_format, orientation):
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](gradient())
    lossless = {"lossless": True} if file_format == "WEBP" else {}
    image = Image.fromarray(np.ascontiguousarray(stored))
    data = encode(image, file_format, exif=exif(orientation), **lossless)
    np.testing.assert_array_equal(decode_image(data, "x"), gradient())
    np.testing.assert_array_equal(decode_mask(data, "x"), gradient().max(axis=-1) > 0)


def test_a_jpeg_with_orientation_stands_upright():
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(gradient(), 1)))
    image = decode_image(encode(turned, "JPEG", exif=exif(6), quality=95), "x")
    assert image.shape == (60, 80, 3)
    assert np.abs(image.astype(int) - gradient()).mean() < 4


def test_grey_is_repeated():
    grey = texture(1)[..., 0]
    image = decode_image(encode(Image.fromarray(grey)), "x")
    np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=-1))
    assert load_image(encode(Image.fromarray(grey)), "x")[0].mode == "L"


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_the_upper_eight_of_sixteen_bits_count(file_format):
    wide = np.array([[0, 255, 256, 0x1234, 65535]], dtype=np.uint16)
    image = decode_image(encode(Image.fromarray(wide), file_format), "x")
    assert image[0, :, 0].tolist() == [0, 0, 1, 0x12, 255]


def test_a_big_endian_sixteen_bit_tiff_reads_alike():
    wide = np.array([[0x1234, 0xFF00]], dtype=np.uint16)
    data = encode(Image.frombytes("I;16B", (2, 1), wide.astype(">u2").tobytes()), "TIFF")
    assert decode_image(data, "x")[0, :, 0].tolist() == [0x12, 0xFF]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_known_range_are_refused(mode):
    data = encode(Image.new(mode, (8, 8)), "TIFF")
    with pytest.raises(DataError, match=r"a/b\.tif has 32 bits"):
        decode_image(data, "a/b.tif")


def test_transparency_is_laid_over_white():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = [0, 255, 51]
    for image in (Image.fromarray(pixels), Image.fromarray(pixels).convert("LA")):
        assert decode_image(encode(image), "x")[0, :, 0].tolist() == [255, 0, 204]


def test_a_transparent_colour_of_a_palette_is_laid_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    decoded = decode_image(encode(image, transparency=0), "x")
    assert decoded.tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_cmyk_and_black_and_white_become_rgb():
    cmyk = Image.fromarray(gradient()).convert("CMYK")
    decoded = decode_image(encode(cmyk, "TIFF"), "x")
    np.testing.assert_array_equal(decoded, np.asarray(cmyk.convert("RGB")))
    bits = Image.fromarray(square_mask()).convert("1")
    np.testing.assert_array_equal(decode_image(encode(bits), "x")[..., 0], square_mask())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"not an image\n" * 9, "is not an image of a known format"),
        (encode(Image.fromarray(texture(0)), "GIF"), "is not an image of a known format"),
        (encode(Image.fromarray(texture(0)))[:-500], "cannot be decoded"),
        (encode(Image.fromarray(texture(0)))[:-12], "cannot be decoded"),
        (encode(Image.fromarray(texture(0)), "JPEG")[:-700], "cannot be decoded"),
        (encode(Image.fromarray(texture(0)), "WEBP")[:-500], "cannot be decoded"),
    ],
)
def test_what_is_no_whole_picture_is_refused_by_name(data, reason):
    for decode in (decode_image, decode_mask):
        with pytest.raises(DataError, match=rf"tile/007\.png {reason}") as caught:
            decode(data, "tile/007.png")
        assert " at 0x" not in str(caught.value)


def test_a_flipped_bit_in_a_png_is_noticed():
    data = bytearray(encode(Image.fromarray(texture(0))))
    data[len(data) // 2] ^= 1
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(bytes(data), "x")


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_frames_and_pages_are_refused(file_format):
    frames = [Image.fromarray(texture(i)) for i in range(3)]
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="x holds 3 frames or pages"):
        decode_image(data, "x")


def test_the_preview_behind_a_camera_jpeg_does_not_matter():
    photo, preview = Image.fromarray(gradient()), Image.fromarray(texture(3, 20, 20))
    data = encode(photo, "MPO", save_all=True, append_images=[preview])
    assert decode_image(data, "x").shape == (60, 80, 3)
    assert load_image(data, "x")[1] == "jpg"


@pytest.mark.parametrize("size", [(100_000, 100_000), (MAX_PIXELS // 1000 + 1, 1000)])
def test_a_decompression_bomb_is_refused_by_its_header(size):
    with pytest.raises(DataError, match=r"(?s)bomb\.png .*pixels"):
        decode_image(header_of_png(*size), "bomb.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on damaged TIFF tags
def test_damaged_files_raise_nothing_but_data_errors():
    generator = random.Random(0)
    image, turned = Image.fromarray(gradient()), exif(6)
    whole = [encode(image, f, exif=turned) for f in ("PNG", "JPEG", "TIFF", "WEBP")]
    whole += [encode(image, "TIFF", compression="tiff_lzw"), encode(image, "BMP")]
    whole += [encode(image.convert("P")), encode(image.convert("CMYK"), "JPEG")]
    for data in whole:
        for _ in range(120):
            damaged = bytearray(data[: generator.randrange(1, 2 * len(data))])
            for _ in range(generator.choice([1, 4])):
                damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
            for decode in (decode_image, decode_mask):
                try:
                    decode(bytes(damaged), "x")
                except DataError as error:
                    assert "x " in error.problem


def test_every_pixel_of_a_mask_that_is_not_black_counts():
    regions = np.array([[0, 1, 2, 255]], np.uint8)
    expected = [[False, True, True, True]]
    assert decode_mask(encode(Image.fromarray(regions)), "x").tolist() == expected
    wide = regions.astype(np.uint16)
    assert decode_mask(encode(Image.fromarray(wide)), "x").tolist() == expected
    colour = np.zeros((1, 4, 3), np.uint8)
    colour[..., 2] = regions
    assert decode_mask(encode(Image.fromarray(colour)), "x").tolist() == expected


def test_a_mask_goes_by_the_colours_of_its_palette_not_their_numbers():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.putpixel((1, 0), 1)
    assert decode_mask(encode(image), "x").tolist() == [[True, False]]


def test_transparent_pixels_of_a_mask_do_not_count():
    pixels = np.full((1, 2, 4), 255, np.uint8)
    pixels[0, 1, 3] = 0
    assert decode_mask(encode(Image.fromarray(pixels)), "x").tolist() == [[True, False]]


def test_the_noise_in_the_black_of_a_jpeg_mask_does_not_count():
    data = encode(Image.fromarray(square_mask()), "JPEG", quality=60)
    assert np.count_nonzero(np.asarray(Image.open(io.BytesIO(data)))) > 100
    wrong = decode_mask(data, "x") != (square_mask() > 0)
    assert wrong.sum() <= 4


def test_squashing_gives_a_square_and_keeps_flat_colours():
    flat = np.full((30, 50, 3), 77, np.uint8)
    assert resize_image(flat, 16).shape == (16, 16, 3)
    assert set(np.unique(resize_image(flat, 16))) == {77}


def test_the_shorter_side_can_be_given_instead():
    assert resize_image(texture(0, 30, 50), 15, "shorter").shape == (15, 25, 3)
    assert resize_image(texture(0, 50, 30), 15, "shorter").shape == (25, 15, 3)


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 254
    small = resize_image(stripes, 8)
    assert np.abs(small[:, 1:-1].astype(int) - 127).max() <= 1


def test_an_image_of_the_right_size_is_left_alone():
    image = Image.fromarray(texture(0, 32, 32))
    assert resized(image, 32, "squash") is image


def test_a_thin_image_cannot_grow_beyond_all_bounds():
    with pytest.raises(DataError, match="would become 256 x 25600000"):
        resized(Image.new("L", (1, 100_000)), 256, "shorter")


def test_masks_are_resized_by_the_nearest_pixel():
    mask = square_mask(40, 48, 20) > 0
    small = resize_mask(mask, 20, 24)
    assert small.dtype == np.bool_
    np.testing.assert_array_equal(small, mask[1::2, 1::2])


def test_a_photograph_with_exif_and_progressive_coding_decodes(shared_data: Path):
    photos = sorted((shared_data / "hazelnut" / "train" / "good").iterdir())
    shapes = {decode_image(photo.read_bytes(), photo.name).shape for photo in photos}
    assert shapes == {(512, 512, 3), (522, 512, 3)}
