"""Class names and colours of a public data set that checkpoints are trained on without naming its classes."""

# PASCAL VOC 2012: the background, then its twenty classes in alphabetical order.
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def voc_palette(classes: int = len(VOC_CLASSES)) -> list[list[int]]:
    """Give the colours of PASCAL VOC's label pictures, one [red, green, blue] per class.

    Bits 0, 3, 6 … of an index are the highest bits of red, the next ones of green and blue (VOC development kit).
    """
    return [
        [sum((index >> (3 * place + channel) & 1) << (7 - place) for place in range(3)) for channel in range(3)]
        for index in range(classes)
    ]
