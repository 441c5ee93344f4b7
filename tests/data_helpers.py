"""A folder of images and labels."""

from PIL import Image


def write_pictures(folder, stems, size=(12, 9), suffix=".png"):
    """Images and labels; label i is filled with i modulo 3, its first pixel ignored."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, stem in enumerate(stems):
        Image.new("RGB", size, (number, 50, 90)).save(folder / "images" / (stem + suffix))
        label = Image.new("L", size, number % 3)
        label.putpixel((0, 0), 255)
        label.save(folder / "labels" / f"{stem}.png")
    return folder
