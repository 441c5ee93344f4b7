"""The painter of the generated demo scenes: a little park, drawn with NumPy and Pillow from random numbers.

A scene is drawn back to front at twice its size, image and label with the same strokes, then halved, blurred, lit and
made noisy. Every part of every object takes its colour from the same few colours of its scene, so that what tells the
classes apart is shape, texture and context.
"""

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Array = NDArray[np.uint8]
Color = tuple[float, float, float]
Point = tuple[float, float]

CLASSES: tuple[str, ...] = ("sky", "grass", "road", "house", "tree", "car", "person", "ball")
SKY, GRASS, ROAD, HOUSE, TREE, CAR, PERSON, BALL = range(len(CLASSES))

_WHITE: Color = (250.0, 248.0, 240.0)
_DARK: Color = (28.0, 28.0, 40.0)


def paint_scene(rng: np.random.Generator, height: int, width: int) -> tuple[Array, Array]:
    """Draw one scene: image (H, W, 3) and label (H, W) with indices into `CLASSES`, both uint8."""
    painter = _Painter(rng, 2 * height, 2 * width)
    painter.paint()
    label = painter.label.resize((width, height), Image.Resampling.NEAREST)
    return _photograph(painter.image.reduce(2), rng), np.array(label)


def _scaled(color: Color, factor: float) -> Color:
    return color[0] * factor, color[1] * factor, color[2] * factor


def _mixed(color: Color, other: Color, share: float) -> Color:
    r, g, b = (a + (c - a) * share for a, c in zip(color, other, strict=True))
    return r, g, b


def _scene_colors(rng: np.random.Generator) -> list[Color]:
    """Eight colours that go well together, in random order: neighbours of a random hue and of its complement."""
    hue = rng.random()
    colors: list[Color] = []
    for offset in (0.0, 0.07, -0.08, 0.16, 0.45, 0.52, 0.60, 0.30):
        turn = (hue + offset + rng.uniform(-0.02, 0.02)) % 1.0
        r, g, b = colorsys.hsv_to_rgb(turn, rng.uniform(0.2, 0.54), rng.uniform(0.64, 0.97))
        colors.append((255 * r, 255 * g, 255 * b))
    return [colors[i] for i in rng.permutation(len(colors))]


class _Painter:
    """Paints one scene of the given height and width in pixels into `image` and `label`.

    An object is drawn around the point on the ground where it stands, x to the right and y up, in units of which a
    picture of the standard shape is about 192 high; each stroke marks the label with the kind now being drawn.
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng, self.height, self.width = rng, height, width
        self.unit = min(height / 192, width / 256)
        colors = _scene_colors(rng)
        self.sky, self.grass, self.road, self.colors = colors[0], colors[1], colors[2], colors[3:]
        self.light = 1.0 if rng.random() < 0.5 else -1.0
        self.horizon = height * self.uniform(0.33, 0.40)
        self.slope = self.uniform(-0.07, 0.07) * height / width
        self.road_top = height * self.uniform(0.53, 0.57)
        self.road_bottom = self.road_top + height * self.uniform(0.23, 0.27)
        image, label = self._background()
        self.image, self.label = Image.fromarray(image), Image.fromarray(label)
        self.draw, self.draw_label = ImageDraw.Draw(self.image, "RGBA"), ImageDraw.Draw(self.label)
        self.kind, self.x, self.y, self.scale = SKY, 0.0, 0.0, self.unit

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def pick(self) -> Color:
        """One of the scene's colours, slightly changed: what every part of every object is painted with."""
        return _scaled(self.colors[int(self.rng.integers(len(self.colors)))], self.uniform(0.92, 1.06))

    def polygon(self, points: Sequence[Point], color: Color) -> None:
        corners = [(self.x + x * self.scale, self.y - y * self.scale) for x, y in points]
        red, green, blue = color
        self.draw.polygon(corners, fill=(min(int(red), 255), min(int(green), 255), min(int(blue), 255)))
        self.draw_label.polygon(corners, fill=self.kind)

    def box(self, left: float, bottom: float, right: float, top: float, color: Color) -> None:
        self.polygon([(left, bottom), (right, bottom), (right, top), (left, top)], color)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: Color) -> None:
        cx, cy, rx, ry = self.x + x * self.scale, self.y - y * self.scale, rx * self.scale, ry * self.scale
        red, green, blue = color
        bounds = (cx - rx, cy - ry, cx + rx, cy + ry)
        self.draw.ellipse(bounds, fill=(min(int(red), 255), min(int(green), 255), min(int(blue), 255)))
        self.draw_label.ellipse(bounds, fill=self.kind)

    def shadow(self, half_width: float) -> None:
        """Darken an ellipse on the ground, away from the light; the label stays."""
        x, rx = self.x - 0.3 * self.light * half_width * self.scale, 1.15 * half_width * self.scale
        self.draw.ellipse((x - rx, self.y - 0.2 * rx, x + rx, self.y + 0.2 * rx), fill=(12, 10, 40, 95))

    def paint(self) -> None:
        """Everything on the background, from far to near."""
        self._clouds()
        self._details()
        u, road, front = self.unit, (self.road_top, self.road_bottom), self.road_bottom + 3 * self.unit
        near = (front, max(front, self.height - 2 * u))
        things = self._places((TREE, HOUSE, TREE), int(self.rng.integers(3, 5)), self.horizon + 9 * u, road[0] - u)
        things += self._places((CAR,), int(self.rng.integers(1, 3)), road[0] + 18 * u, road[1] - 4 * u)
        things += self._places((PERSON, BALL), int(self.rng.integers(2, 4)), *near)
        draw = {HOUSE: self._house, TREE: self._tree, CAR: self._car, PERSON: self._person, BALL: self._ball}
        for y, x, kind in sorted(things):
            depth = (y - self.horizon) / (self.height - self.horizon)
            self.kind, self.x, self.y = kind, x, y + self.slope * (x - self.width / 2)
            self.scale = u * (1.15 + 0.5 * depth) * self.uniform(0.88, 1.14)
            draw[kind]()
        if self.rng.random() < 0.35:  # the shadow of something outside the picture
            left, wide, lean = self.uniform(-0.1, 0.8), self.uniform(0.15, 0.4), self.uniform(-0.3, 0.3)
            across = [(left, road[0]), (left + wide, road[0]), (left + wide + lean, self.height)]
            across.append((left + lean, self.height))
            self.draw.polygon([(x * self.width, y) for x, y in across], fill=(10, 10, 40, 70))

    def _places(self, kinds: Sequence[int], count: int, top: float, bottom: float) -> list[tuple[float, float, int]]:
        """Spread (y, x, kind) evenly over the width, the kinds in turn."""
        count = max(1, round(count * self.width / (256 * self.unit)))
        step, first = self.width / count, int(self.rng.integers(len(kinds)))
        return [
            (self.uniform(top, bottom), (i + self.uniform(0.2, 0.8)) * step, kinds[(first + i) % len(kinds)])
            for i in range(count)
        ]

    def _background(self) -> tuple[Array, Array]:
        """Sky, hills, grass and road: colour, gradient and texture, (H, W, 3), and label, (H, W)."""
        height, width, rng = self.height, self.width, self.rng
        y = np.arange(height, dtype=np.float32)[:, None]
        x = np.arange(width, dtype=np.float32)[None, :] - width / 2
        tilt, waves = self.slope * x, x * (2 * math.pi / (256 * self.unit))
        hills = tilt - 6 * self.unit * np.sin(waves * self.uniform(0.6, 1.6) + self.uniform(0, 6)) + self.horizon
        meadow = tilt + 5 * self.unit * (1 + np.sin(waves * self.uniform(1, 2) + self.uniform(0, 6))) + self.horizon
        is_sky, is_hill = y < np.minimum(hills, meadow), y < meadow
        is_road = (y > self.road_top + tilt) & (y < self.road_bottom + tilt)
        label = np.where(is_sky, SKY, np.where(is_road, ROAD, GRASS)).astype(np.uint8)

        grain = rng.standard_normal((height, width), dtype=np.float32)
        blades = grain.copy()
        for step in range(1, 6):
            blades[step:] += grain[:-step]
        coarse = Image.fromarray(rng.standard_normal((7, 9), dtype=np.float32))
        patches = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        near = np.clip((y - self.horizon) / (height - self.horizon), 0, 1)
        texture = np.where(is_road, 0.05 * grain * np.abs(grain), blades * (0.022 + 0.03 * near) + 0.05 * patches)

        low, far, rise = (
            _mixed(self.sky, _WHITE, 0.55),
            _scaled(_mixed(self.grass, self.sky, 0.25), 0.92),
            y / self.horizon,
        )
        image = np.empty((height, width, 3), dtype=np.float32)
        for c in range(3):
            grass = np.where(is_hill, far[c], self.grass[c] * (0.92 + 0.13 * near))
            ground = np.where(is_road, self.road[c], grass) * (1 + texture)
            image[..., c] = np.where(is_sky, self.sky[c] + (low[c] - self.sky[c]) * rise, ground)
        return np.clip(image, 0, 255).astype(np.uint8), label

    def _clouds(self) -> None:
        veil = Image.new("L", (self.width, math.ceil(self.horizon)))
        draw = ImageDraw.Draw(veil)
        for _ in range(int(self.rng.integers(2, 5))):
            x, y = self.uniform(0, self.width), self.uniform(0.1, 0.7) * self.horizon
            size = self.uniform(10, 20) * self.unit
            for _ in range(7):
                cx, r = x + self.uniform(-1.4, 1.4) * size, self.uniform(0.35, 0.75) * size
                draw.ellipse((cx - r, y - 0.6 * r, cx + r, y + 0.35 * r), fill=150)
        veil = veil.filter(ImageFilter.BoxBlur(1.5 * self.unit))
        on_sky = self.label.crop((0, 0, *veil.size)).point([255] + [0] * 255)
        self.image.paste((255, 252, 248), (0, 0), ImageChops.multiply(veil, on_sky))

    def _details(self) -> None:
        """Kerbs and the broken line of the road, flowers in the grass."""
        self.kind, middle = ROAD, (self.road_top + self.road_bottom) / 2
        u, dash = self.unit, 16 * self.unit
        strips = [(0.0, float(self.width), top, 3 * u) for top in (self.road_top, self.road_bottom - 3 * u)]
        strips += [(x, x + dash, middle - u, 2.5 * u) for x in np.arange(-self.uniform(0, 30) * u, self.width, 30 * u)]
        for i, (left, right, top, thick) in enumerate(strips):
            a, b = (self.slope * (x - self.width / 2) + top for x in (left, right))
            self.x, self.y, self.scale = 0, 0, 1
            color = _mixed(self.road, _WHITE, 0.45 if i < 2 else 0.7)
            self.polygon([(left, -a), (right, -b), (right, -b - thick), (left, -a - thick)], color)
        self.kind, self.scale = GRASS, u
        petals = (self.pick(), _mixed(self.pick(), _WHITE, 0.5))
        for i in range(40):
            self.x, self.y = self.uniform(0, self.width), self.uniform(self.road_bottom + 6 * u, self.height)
            self.y += self.slope * (self.x - self.width / 2)
            r = self.uniform(0.7, 1.5)
            self.ellipse(0, 0, r, 0.8 * r, petals[i % 2])

    def _house(self) -> None:
        half, tall, wall = self.uniform(27, 38), self.uniform(34, 48), self.pick()
        self.shadow(half)
        self.box(-half, 0, half, tall, _mixed(wall, _WHITE, 0.35))
        for row in range(math.ceil(tall / 4.6)):
            top = tall - 4.6 * row
            for start in np.arange(-half - 4.5 * (row % 2), half, 9.0):
                left, right = max(start, -half), min(start + 7.9, half)
                if right > left:
                    self.box(left, max(top - 3.5, 0), right, top, _scaled(wall, self.uniform(0.8, 1.02)))
        frame, glass, door = _mixed(self.pick(), _WHITE, 0.75), _scaled(self.pick(), 0.5), self.pick()
        columns = 3 if half > 32 else 2
        door_at = int(self.rng.integers(columns))
        for i in range(columns):
            x = half * (2 * (i + 0.5) / columns - 1)
            if i == door_at:
                self.box(x - 6.5, 0, x + 6.5, 20, frame)
                self.box(x - 5, 0, x + 5, 18.5, door)
            for y in (tall - 21, tall - 41):
                if y > (21 if i == door_at else 1):
                    self.box(x - 6.5, y, x + 6.5, y + 14, frame)
                    self.box(x - 5, y + 1.5, x - 0.6, y + 12.5, glass)
                    self.box(x + 0.6, y + 1.5, x + 5, y + 12.5, glass)
        self._roof(tall, half + 4)

    def _roof(self, eaves: float, half: float) -> None:
        """A roof that narrows to its ridge, in rows of round tiles, with or without a chimney."""
        tall, ridge, color = self.uniform(18, 30), half * self.uniform(0.1, 0.7), self.pick()
        if self.rng.random() < 0.6:
            x = self.uniform(-0.6, 0.6) * ridge
            self.box(x - 4, eaves + 0.5 * tall, x + 4, eaves + tall + 7, _scaled(color, 0.6))
        outline = [(-half, eaves), (half, eaves), (ridge, eaves + tall), (-ridge, eaves + tall)]
        self.polygon(outline, _scaled(color, 0.8))
        rows = round(tall / 5)
        for row in range(rows):
            reach, y = ridge + (half - ridge) * (row + 0.5) / rows, eaves + tall * (1 - (row + 0.3) / rows)
            count = max(1, round(reach / 3))
            for i in range(count):
                x = reach * ((2 * i + 1) / count - 1)
                self.ellipse(x, y, 0.88 * reach / count, 0.6 * tall / rows, _scaled(color, self.uniform(0.86, 1.1)))

    def _tree(self) -> None:
        trunk, color, tall, half = _scaled(self.pick(), 0.55), self.pick(), self.uniform(46, 62), self.uniform(22, 28)
        self.shadow(half)
        self.polygon([(-8, 0), (8, 0), (6, 0.5 * tall), (-6, 0.5 * tall)], trunk)
        if self.rng.random() < 0.4:
            self._skirts(0.16 * tall, 0.84 * tall, half, color)
            return
        middle = tall - 0.9 * half
        self.ellipse(0, middle, 0.9 * half, 0.8 * half, _scaled(color, 0.72))
        for _ in range(8):
            r = half * self.uniform(0.5, 0.7)
            dx, dy = half * self.uniform(-0.55, 0.55), half * self.uniform(-0.4, 0.5)
            self.ellipse(dx, middle + dy, r, r, _scaled(color, 0.72))
        for _ in range(120):
            angle, reach, r = self.uniform(0, 2 * math.pi), math.sqrt(self.rng.random()), self.uniform(1.4, 2.9)
            dx, dy = math.cos(angle) * reach, math.sin(angle) * reach
            lit = 0.94 + 0.15 * (self.light * dx + dy) + self.uniform(-0.12, 0.12)
            self.ellipse(0.9 * dx * half, middle + 0.85 * dy * half, r, 0.75 * r, _scaled(color, lit))

    def _skirts(self, bottom: float, tall: float, half: float, color: Color) -> None:
        """A conifer's crown: overlapping skirts of needles, each with a jagged lower edge."""
        for tier in range(3):
            low, reach = bottom + 0.26 * tall * tier, half * (1 - 0.22 * tier)
            edge = [(i / 6 - 1, low + tall * 0.035 * (i % 2 + abs(i / 6 - 1))) for i in range(13)]
            top = low + 0.48 * tall
            self.polygon([(0, top), *((share * reach, y) for share, y in edge)], _scaled(color, 0.72 + 0.1 * tier))
            for _ in range(30):
                depth, share, n = 0.85 * math.sqrt(self.rng.random()), self.uniform(-0.8, 0.8), 0.05 * tall
                x, y = share * reach * depth, top - 0.48 * tall * depth
                lit = self.uniform(0.85, 1.15) + 0.12 * self.light * share
                self.polygon([(x, y), (x + share * n, y - n), (x + (0.3 + share) * n, y - n)], _scaled(color, lit))

    def _car(self) -> None:
        body, glass = self.pick(), _mixed(_scaled(self.pick(), 0.55), _WHITE, 0.25)
        way, tall = (1.0 if self.rng.random() < 0.5 else -1.0), self.uniform(31, 36)
        long = way * self.uniform(35, 42)
        self.shadow(abs(long))

        def panel(corners: Sequence[Point], color: Color) -> None:
            self.polygon([(x * long, y * tall) for x, y in corners], color)

        hood = [(0.45, 0.63), (0.9, 0.56), (1, 0.45), (1, 0.12)]
        panel([(-1, 0.12), (-1, 0.55), (-0.9, 0.62), (-0.72, 0.64), (-0.5, 1), (0.15, 1), *hood], body)
        panel([(-1, 0.12), (-1, 0.32), (1, 0.32), (1, 0.12)], _scaled(body, 0.72))
        panel([(-0.62, 0.66), (-0.45, 0.92), (-0.2, 0.92), (-0.2, 0.66)], glass)
        panel([(-0.13, 0.66), (-0.13, 0.92), (0.11, 0.92), (0.34, 0.66)], glass)
        panel([(-0.18, 0.25), (-0.18, 0.62), (-0.155, 0.62), (-0.155, 0.25)], _scaled(body, 0.6))
        panel([(0.88, 0.42), (0.88, 0.53), (0.95, 0.5), (1, 0.42)], _mixed(body, _WHITE, 0.8))
        panel([(-1, 0.42), (-1, 0.54), (-0.92, 0.54), (-0.92, 0.42)], _scaled(self.pick(), 0.8))
        for x in (-0.55 * long, 0.58 * long):
            for r, color in ((7.6, _DARK), (4.4, _mixed(body, _WHITE, 0.6)), (1.7, _DARK)):
                self.ellipse(x, 0.2 * tall, r, r, color)

    def _person(self) -> None:
        """A child: two legs with shoes, arms with hands, a shirt with or without stripes, a head with hair."""
        shirt, trousers, hair = self.pick(), _scaled(self.pick(), 0.75), _scaled(self.pick(), 0.4)
        skin, stride = _mixed((120, 78, 55), (245, 205, 175), self.rng.random()), self.uniform(0, 2)
        self.shadow(13)
        for side in (-1.0, 1.0):
            hip, foot, hand = side * 5, side * (5.5 + stride), side * self.uniform(12, 15)
            leg = [(hip - 6, 24), (hip + 6, 24), (foot + 5, 2), (foot - 5, 2)]
            self.polygon(leg, _scaled(trousers, 1 + 0.07 * side * self.light))
            self.ellipse(foot + side, 2.5, 6, 3, _DARK)
            arm = [(side * 7, 45), (side * 12, 43), (hand + side * 3, 27), (hand - side * 5, 26)]
            self.polygon(arm, _scaled(shirt, 0.8))
            self.ellipse(hand, 25, 4, 4, skin)
        self.polygon([(-11, 20), (-12, 44), (-8, 47), (8, 47), (12, 44), (11, 20)], shirt)
        for y in (26, 33, 40) if self.rng.random() < 0.6 else ():
            self.box(-11, y - 3, 11, y, _mixed(shirt, _WHITE, 0.6))
        self.ellipse(0, 58, 11.5, 12, hair)
        self.ellipse(1.2 * self.light, 56, 9.8, 9.8, skin)
        for side in (-1.0, 1.0):
            self.ellipse(side * 3.6 + 2 * self.light, 57, 1.2, 1.7, _DARK)

    def _ball(self) -> None:
        """A beach ball: wedges of two colours that meet at a pole somewhere on it."""
        r, turn = self.uniform(14, 20), self.uniform(0, 6)
        x, y = r * self.uniform(-0.35, 0.35), r * self.uniform(0.9, 1.35)
        self.shadow(r)
        self.ellipse(0, r, r, r, self.pick())
        color = _mixed(self.pick(), _WHITE, 0.65)
        for i in range(0, 6, 2):
            arc = [turn + (i + k / 6) * math.pi / 3 for k in range(7)]
            self.polygon([(x, y), *((r * math.cos(a), r + r * math.sin(a)) for a in arc)], color)
        self.ellipse(x, y, 0.17 * r, 0.17 * r, _WHITE)


def _photograph(image: Image.Image, rng: np.random.Generator) -> Array:
    """Lens blur, tinted and uneven light, sensor noise."""
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.7)))
    width, height = image.size
    warmth, angle = rng.uniform(-0.06, 0.06), rng.uniform(0, 2 * math.pi)
    gain = np.array([1 + warmth, 1, 1 - warmth], dtype=np.float32) * np.float32(rng.uniform(0.86, 1.1))
    y = np.linspace(-math.sin(angle), math.sin(angle), height, dtype=np.float32)[:, None]
    x = np.linspace(-math.cos(angle), math.cos(angle), width, dtype=np.float32)[None, :]
    pixels = np.asarray(image, dtype=np.float32) * gain * (1 + np.float32(rng.uniform(0, 0.12)) * (x + y)[..., None])
    pixels += np.float32(rng.uniform(1.0, 5.0)) * rng.standard_normal(pixels.shape, dtype=np.float32)
    sensed: Array = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return sensed
