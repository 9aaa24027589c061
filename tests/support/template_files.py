"""Writes a small set of templates to disk in the form of IJB-C: crops with landmarks, templates, media and lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fused_arcface.app.data.alignment import POINTS

from .image_files import picture


def landmarks_of(turn: float, zoom: float, shift: tuple[float, float]) -> np.ndarray:
    """Where the five points of an aligned face lie after it was turned (radians), zoomed and shifted (pixels)."""
    rotation = zoom * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return POINTS @ rotation.T + np.array(shift)


def write_template_set(
    root: Path, people: int, name: str = "ijbc", galleries: tuple[str, str] = ("G1", "G2"), seed: int = 0
) -> Path:
    """Three templates a person: one for the galleries and two probes; each has two photos and a video of 2-4 frames.

    The galleries share the people but for the last one, who is in none.
    """
    generator = np.random.default_rng(seed)
    (root / "meta").mkdir(parents=True)
    (root / "loose_crop").mkdir()
    faces, detected, owner = [], [], {}
    number = medium = 0
    for person in range(people):
        for kind in range(3):
            template = 100 + 7 * (3 * person + kind)
            owner[template] = person
            frames = int(generator.integers(2, 5))
            for length in (1, 1, frames):
                medium += 1
                for _ in range(length):
                    number += 1
                    side = int(generator.integers(90, 140))
                    picture(person, number % 9, "L", (side, side)).save(root / "loose_crop" / f"{number}.jpg")
                    faces.append(f"{number}.jpg {template} {medium}")
                    middle = (side - 112) / 2 + generator.normal(size=2)
                    points = landmarks_of(generator.normal() * 0.1, 1 + generator.normal() * 0.05, tuple(middle))
                    coordinates = " ".join(f"{each:.3f}" for each in points.flatten())
                    detected.append(f"{number}.jpg {coordinates} {generator.uniform(0.3, 0.99):.3f}")
    templates = list(owner)
    probes = [template for place, template in enumerate(templates) if place % 3]
    pairs = [(a, b) for a in templates[::3] for b in probes]
    text = {
        "face_tid_mid.txt": faces,
        "name_5pts_score.txt": detected,
        "template_pair_label.txt": [f"{a} {b} {int(owner[a] == owner[b])}" for a, b in pairs],
        "1N_probe_mixed.csv": _listed(probes, owner),
    }
    known = [template for template in templates[::3] if owner[template] < people - 1]
    for place, gallery in enumerate(galleries):
        text[f"1N_gallery_{gallery}.csv"] = _listed(known[place::2], owner)
    for ending, lines in text.items():
        (root / "meta" / f"{name}_{ending}").write_text("\n".join(lines) + "\n")
    Image.new("L", (4, 4)).save(root / "loose_crop" / "not_listed.jpg")
    return root


def _listed(templates: list[int], owner: dict[int, int]) -> list[str]:
    """A heading, and two lines for each template, as the lists of IJB-C have one for each image."""
    lines = [f"{template},{1000 + owner[template]},img/{line}.jpg" for template in templates for line in range(2)]
    return ["TEMPLATE_ID,SUBJECT_ID,FILENAME", *lines]
