"""The pictures of the site's page "Play": `tools/make_site_pictures.py [--only films|faces]` writes docs/_static/play/. Seeds are fixed; about two minutes of one core.

films  three people, one of whom gets another driver, under three rules for who hears whom: real films by the weights called `tiny`.
       A film has three rows: before, after, and the difference of the two, enlarged. `films.json` holds how much each face changed.
faces  one identity in all combinations of five factors: a sheet for each yaw, its rows mouth and smile, its columns blink and gaze
"""
import argparse
import json
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fantasy_nb.core import as_frames, tile_frames, write_video
from fantasy_nb.exprbench import Benchmark, Case, Studio, another_driver, unchanged
from fantasy_nb.faces import Expression, Identity, render_face

OUT = Path(__file__).resolve().parent.parent / "docs" / "_static" / "play"
RULES = ("full", "no-mask", "release")
GAIN, SCALE = 6, 2  # difference times six, pictures twice as large
STOPS = {"yaw": (-30, -15, 0, 15, 30), "mouth_open": (0, 0.5, 1), "smile": (0, 0.5, 1), "blink": (0, 0.5, 1), "gaze_x": (-1, 0, 1)}
FACE, SIZE, CROP = 8, 220, np.s_[:, 8:168, 38:182]  # identity's seed, pixels, and where the head is


def changes(before: np.ndarray, after: np.ndarray, case: Case, other: Case) -> list[float]:
    "Root mean square change of each face, in grey levels of 255, where another film could not rightly differ because of the neighbour's head."
    moved, mine = np.square(before.astype(float) - after).mean(-1), unchanged(case.film[1:], other.film[1:])
    who = [k for k, (a, b) in enumerate(zip(case.motions, other.motions)) if a is not b]
    return [round(float(np.sqrt(moved[case.face(k)][... if k in who else mine[case.face(k)]].mean())), 2) for k in range(case.people)]


def in_rows(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    "Before, after and what differs, one above the other, enlarged."
    apart = np.abs(before.astype(int) - after).max(-1, keepdims=True) * GAIN
    rows = [before, after, np.broadcast_to(apart.clip(0, 255).astype(np.uint8), before.shape)]
    return np.concatenate(rows, 1).repeat(SCALE, 1).repeat(SCALE, 2)


def films(seed: int, index: int) -> None:
    "Nine films and what changed in them."
    torch.set_num_threads(1)
    case, found = Benchmark(people=(3,)).case(3, seed, index), {}
    for rule in RULES:
        studio = Studio("tiny", rule)
        before = studio.film(case)
        for person in range(3):
            other = another_driver(case, person)
            after = studio.film(other)
            found[f"{rule}-{person + 1}"] = changes(before, after, case, other)
            write_video(OUT / f"{rule}-{person + 1}.mp4", in_rows(before, after), fps=12, crf=26)
            print(rule, person + 1, found[f"{rule}-{person + 1}"])
    (OUT / "films.json").write_text(json.dumps(found, indent=1) + "\n")


def faces() -> None:
    "Five sheets of 81 faces."
    who = Identity.sample(1, seed=FACE)
    for yaw in STOPS["yaw"]:
        all_of = torch.tensor(list(product(*(STOPS[name] for name in ("mouth_open", "smile", "blink", "gaze_x"))))).T.float()
        mouth, smile, blink, gaze = all_of
        doing = Expression.neutral(81, yaw=torch.full((81,), float(yaw)), mouth_open=mouth, smile=smile, blink_left=blink, blink_right=blink, gaze_x=gaze)
        pictures = torch.cat([render_face(who, part, SIZE) for part in (doing[k : k + 9] for k in range(0, 81, 9))])
        Image.fromarray(tile_frames(as_frames(pictures)[CROP], columns=9, gap=0)).save(OUT / f"yaw{yaw}.webp", quality=74, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["films", "faces"])
    parser.add_argument("--case", type=int, nargs=2, default=(0, 1), metavar=("SEED", "INDEX"))
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if args.only != "films":
        faces()
    if args.only != "faces":
        films(*args.case)
    print(f"{sum(p.stat().st_size for p in OUT.iterdir()) / 1e6:.2f} MB in {OUT}")


if __name__ == "__main__":
    main()
