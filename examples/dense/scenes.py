"""Embedded data: procedural street-like scenes, made at run time from a seed, with everything dense tasks need.

Each scene is painted from back to front: sky, hills, ground with a road, then things that stand on the ground at
different distances and hide each other. One light lights a whole scene: it sets the brightness, the warm or cold tint,
the side that things are shaded on and where their shadows fall. From the same painting come the image, the label map,
the instance masks, the boxes and the depth.

`style` changes how scenes look and not what is in them: "day" is the domain of the tasks; "dusk" has other colours,
textures and light, and is what the nano backbone is pretrained on, so that adapting it is transfer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm.auto import tqdm

CLASSES = ("sky", "hill", "ground", "road", "building", "tree", "car", "person", "ball")
THINGS = CLASSES[4:]
HEIGHT, WIDTH = 96, 128
FAR = 80.0  # metres; the sky is at this depth

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Style:
    """How a domain looks: base colour of each class, spread of colours, contrast of textures, range of the light."""

    colours: dict[str, tuple[float, float, float]]
    spread: float
    texture: float
    light: tuple[float, float]
    tint: tuple[float, float, float]
    noise: float


STYLES = {
    "day": Style(
        colours={
            "sky": (0.55, 0.73, 0.92),
            "hill": (0.42, 0.52, 0.42),
            "ground": (0.45, 0.55, 0.28),
            "road": (0.42, 0.41, 0.42),
            "building": (0.64, 0.50, 0.42),
            "tree": (0.22, 0.42, 0.18),
            "car": (0.62, 0.22, 0.22),
            "person": (0.55, 0.42, 0.46),
            "ball": (0.85, 0.62, 0.22),
        },
        spread=0.12,
        texture=0.16,
        light=(0.6, 1.15),
        tint=(0.05, 0.0, -0.05),
        noise=0.02,
    ),
    "dusk": Style(
        colours={
            "sky": (0.62, 0.38, 0.36),
            "hill": (0.24, 0.20, 0.34),
            "ground": (0.33, 0.26, 0.22),
            "road": (0.20, 0.20, 0.26),
            "building": (0.32, 0.34, 0.46),
            "tree": (0.14, 0.20, 0.24),
            "car": (0.24, 0.34, 0.62),
            "person": (0.46, 0.28, 0.30),
            "ball": (0.36, 0.62, 0.56),
        },
        spread=0.06,
        texture=0.07,
        light=(0.5, 0.9),
        tint=(0.1, -0.02, 0.06),
        noise=0.05,
    ),
}


class Painter:
    """One scene's canvas: colour, label, instance and depth, painted over from back to front."""

    def __init__(self, rng: np.random.Generator, style: Style) -> None:
        self.rng, self.style = rng, style
        self.y, self.x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
        self.colour = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        self.label = np.zeros((HEIGHT, WIDTH), np.uint8)
        self.instance = np.zeros((HEIGHT, WIDTH), np.uint8)
        self.depth = np.full((HEIGHT, WIDTH), FAR, np.float32)
        self.categories: list[int] = []
        self.light_side = float(rng.choice([-1.0, 1.0]))
        self.horizon = float(rng.uniform(0.3, 0.48)) * HEIGHT

    def texture(self, scale: int, stretch: int = 1) -> Array:
        """Smooth noise with a grain of `scale` pixels, of mean 0."""
        coarse = self.rng.normal(size=(HEIGHT // scale + 2, WIDTH // (scale * stretch) + 2)).astype(np.float32)
        resized = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        return np.asarray(resized, dtype=np.float32) * self.style.texture

    def base_colour(self, name: str, spread: float = 1.0) -> Array:
        jitter = self.rng.normal(scale=self.style.spread * spread, size=3)
        return np.clip(np.asarray(self.style.colours[name]) + jitter, 0.03, 1.0).astype(np.float32)

    def paint(self, name: str, mask: npt.NDArray[np.bool_], shade: Array, depth: Array | float) -> None:
        """Paint a class where `mask` is set; `shade` multiplies its base colour."""
        self.colour[mask] = (self.base_colour(name) * shade[..., None])[mask]
        self.label[mask] = CLASSES.index(name)
        self.depth[mask] = (np.zeros_like(self.depth) + depth)[mask]
        self.instance[mask] = 0
        if name in THINGS:
            self.categories.append(THINGS.index(name))
            self.instance[mask] = len(self.categories)

    def shadow(self, centre: float, foot: float, width: float, height: float) -> None:
        """Darken the ground beside a thing, away from the light, before the thing is painted."""
        x = (self.x - centre - self.light_side * 0.6 * width) / max(width, 1)
        y = (self.y - foot) / max(0.12 * height, 1)
        on_ground = self.y > self.horizon
        self.colour[(x**2 + y**2 < 1) & on_ground] *= 0.6

    def ground_depth(self, y: Array | float) -> Array:
        """Depth in metres of a ground point in row `y`: a camera 1.5 m above a plane."""
        below = np.maximum(np.asarray(y, np.float32) - self.horizon, 0.5)
        return np.minimum(1.5 * HEIGHT / below, FAR).astype(np.float32)

    def backdrop(self) -> None:
        gradient = 1.15 - 0.3 * self.y / HEIGHT
        self.paint("sky", np.ones((HEIGHT, WIDTH), bool), gradient + 0.5 * self.texture(16, 2), FAR)
        ridge = self.horizon - 6 - 8 * np.abs(np.asarray(self.texture(32)[0]) / self.style.texture)
        self.paint("hill", (self.y > ridge[None]) & (self.y <= self.horizon + 1), 1 + self.texture(4), 0.75 * FAR)
        ground = self.y > self.horizon
        self.paint("ground", ground, 1 + self.texture(3) + 0.5 * self.texture(12), self.ground_depth(self.y))
        vanish, bend = self.rng.uniform(0.25, 0.75) * WIDTH, self.rng.normal(scale=0.25)
        near = (self.y - self.horizon) / (HEIGHT - self.horizon)
        middle = vanish + (self.rng.uniform(0.2, 0.8) * WIDTH - vanish) * near + bend * WIDTH * near * (1 - near)
        road = ground & (np.abs(self.x - middle) < 2 + 0.32 * WIDTH * near)
        self.paint("road", road, 1 + 0.5 * self.texture(2, 4), self.ground_depth(self.y))
        line = road & (np.abs(self.x - middle) < 0.4 + 1.6 * near) & (np.sin(30 / (near + 0.15)) > 0)
        self.colour[line] = 0.85

    def thing(self, name: str, foot: float) -> None:
        """Paint one thing that stands on the ground in row `foot`."""
        rng = self.rng
        scale = (foot - self.horizon) / (HEIGHT - self.horizon)
        centre = float(rng.uniform(0, WIDTH))
        u_light = -self.light_side
        aspect, size = {
            "building": (rng.uniform(0.5, 1.3), rng.uniform(70, 120)),
            "tree": (rng.uniform(0.5, 0.8), rng.uniform(50, 80)),
            "car": (rng.uniform(1.6, 2.2), rng.uniform(18, 24)),
            "person": (rng.uniform(0.28, 0.38), rng.uniform(26, 32)),
            "ball": (1.0, rng.uniform(10, 16)),
        }[name]
        height = max(size * scale, 3.0)
        width = max(aspect * height, 2.0)
        u = (self.x - centre) / (width / 2)  # -1..1 across the thing
        v = (foot - self.y) / height  # 0 at the foot, 1 at the top
        inside = (np.abs(u) <= 1) & (v >= 0) & (v <= 1)
        shade = 1 + 0.25 * u_light * u + self.texture(2)
        if name == "building":
            windows = (np.sin(u * rng.uniform(6, 12)) > 0.2) & (np.sin(v * rng.uniform(15, 30)) > 0.2)
            shade = (0.85 + 0.25 * np.sign(u * u_light - 0.2)) * np.where(windows, 0.6, 1.0) + self.texture(2)
            mask = inside
        elif name == "tree":
            crown = u**2 + ((v - 0.65) / 0.38) ** 2 + 3 * self.texture(4) < 1
            mask = crown | ((np.abs(u) < 0.14) & (v >= 0) & (v < 0.4))
            shade = np.where(crown, shade + 1.5 * self.texture(3), 0.7)
        elif name == "car":
            cabin = (np.abs(u) < 0.62 - 0.3 * (v - 0.5)) & (v >= 0.5) & (v <= 1)
            body = inside & (v < 0.55) & (v > 0.12)
            wheels = ((np.abs(u) - 0.6) ** 2 * (width / height) ** 2 / 4 + (v - 0.14) ** 2) < 0.03
            mask = cabin | body | wheels
            shade = np.where(wheels, 0.2, np.where(cabin & (v < 0.9), 0.5, shade + 0.2))
        elif name == "person":
            head = (u / 0.55) ** 2 + ((v - 0.9) / 0.1) ** 2 < 1
            mask = head | (inside & (v < 0.82) & (np.abs(u) < np.where(v > 0.42, 0.85, 0.6)))
            shade = np.where(head, 1.35, np.where(v < 0.42, 0.65, 1.0)) * shade
        else:
            radius = u**2 + (2 * v - 1) ** 2
            mask = radius < 1
            shade = 0.55 + 0.6 * np.sqrt(np.maximum(1 - radius, 0)) + 0.3 * u_light * u
            shade = np.where(np.sin(6 * (u + v)) > 0, shade, 0.7 * shade)
        if mask.sum() >= 6:
            self.shadow(centre, foot, width, height)
            self.paint(name, mask, shade.astype(np.float32), float(self.ground_depth(foot)))

    def finish(self) -> Array:
        """Light, haze with the distance, tint, sensor noise; values in 0..1."""
        rng, style = self.rng, self.style
        light = rng.uniform(*style.light) * (1 + 0.15 * self.light_side * (self.x / WIDTH - 0.5))
        haze = (1 - np.exp(-self.depth / rng.uniform(60, 200)))[..., None] * 0.6
        sky = np.asarray(style.colours["sky"], np.float32)
        image = (self.colour * (1 - haze) + sky * haze) * light[..., None]
        image = image + rng.uniform(-1, 1) * np.asarray(style.tint) + rng.normal(scale=style.noise, size=image.shape)
        return np.clip(image, 0, 1).astype(np.float32)


def make_scene(seed: int, style: str = "day") -> dict[str, Any]:
    """Paint one scene.

    Returns:
        `image` (RGB), `label` (class ids), `instances` (0 is none, i is the i-th object), `depth_map` (metres,
        float32), and `objects` with `id`, `bbox` ([x, y, width, height] in pixels), `category` (index into `THINGS`)
        and `area` (visible pixels), as in cppe-5.
    """
    rng = np.random.default_rng(seed)
    painter = Painter(rng, STYLES[style])
    painter.backdrop()
    rows = np.sort(rng.uniform(painter.horizon + 3, HEIGHT - 2, size=rng.integers(5, 11)))
    for row in rows:
        painter.thing(str(rng.choice(THINGS, p=[0.22, 0.26, 0.22, 0.18, 0.12])), float(row))
    image = painter.finish()

    objects: dict[str, list[Any]] = {"id": [], "bbox": [], "category": [], "area": []}
    instances = np.zeros_like(painter.instance)
    for i, category in enumerate(painter.categories, start=1):
        visible = painter.instance == i
        area = int(visible.sum())
        if area < 6:
            continue  # hidden by what stands before it
        rows_, columns = np.nonzero(visible)
        x, y = int(columns.min()), int(rows_.min())
        objects["id"].append(len(objects["id"]) + 1)
        objects["bbox"].append([float(x), float(y), float(columns.max() - x + 1), float(rows_.max() - y + 1)])
        objects["category"].append(category)
        objects["area"].append(area)
        instances[visible] = objects["id"][-1]
    return {
        "image": Image.fromarray((image * 255).astype(np.uint8)),
        "label": Image.fromarray(painter.label),
        "instances": Image.fromarray(instances),
        "depth_map": painter.depth,
        "objects": objects,
    }


FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.Image(),
        "instances": datasets.Image(),
        "depth_map": datasets.Array2D((HEIGHT, WIDTH), "float32"),
        "objects": {
            "id": datasets.Sequence(datasets.Value("int64")),
            "bbox": datasets.Sequence(datasets.Sequence(datasets.Value("float32"), length=4)),
            "category": datasets.Sequence(datasets.ClassLabel(names=list(THINGS))),
            "area": datasets.Sequence(datasets.Value("int64")),
        },
    }
)


def make_scenes(count: int, seed: int = 0, style: str = "day") -> datasets.Dataset:
    """A dataset of `count` scenes, the same for the same arguments.

    Raises:
        ValueError: If `style` is not known or `count` is less than 1.
    """
    if style not in STYLES:
        raise ValueError(f"style={style!r} is not known; choose one of {sorted(STYLES)}")
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")

    first = int(np.random.SeedSequence([seed, sorted(STYLES).index(style)]).generate_state(1, np.uint32)[0])
    scenes = [make_scene(first + i, style) for i in tqdm(range(count), desc=f"painting {style} scenes")]
    return datasets.Dataset.from_dict({key: [scene[key] for scene in scenes] for key in FEATURES}, features=FEATURES)
