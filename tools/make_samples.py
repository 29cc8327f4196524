"""Make data_samples/: portraits of one, two and three people, driving clips and the true expression curves behind them.

Everything comes from seeds: the same script gives the same pictures. `python tools/make_samples.py [FOLDER]`"""

import json
import sys
from pathlib import Path

import torch

from fantasy_nb.core import write_image, write_video
from fantasy_nb.data import turned
from fantasy_nb.faces import Expression, Identity, Scene, random_motion, render_face, render_scene

PORTRAITS = {"one": (1, 9007), "two": (2, 9004), "three": (3, 9003)}  # people, seed of the scene
DRIVERS = {"a": (9101, 9342), "b": (9106, 9486), "c": (9104, 9376), "d": (9107, 9416)}  # seed of the person, of the motion; a and b: yaw r .08, mouth open .23 (but smiles .83)
FRAMES, FPS, HEIGHT = 75, 25, 256
HEAD = 0.5  # of `random_motion`'s angles: people who talk to a camera, not people who look around


def portrait(people: int, seed: int) -> torch.Tensor:  # (3 h w)
    "A scene at rest: everybody looks ahead, more or less, with a closed mouth."
    width = HEIGHT if people == 1 else HEIGHT * 3 // 4 * people
    calm = [Expression.neutral(1, yaw=6.0 * (-1) ** k, smile=0.2 * k, gaze_x=-0.1) for k in range(people)]
    return render_scene(Scene.sample(people, seed), calm, (HEIGHT, width))[0][0]


def main(folder="data_samples") -> None:
    "Write everything."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (people, seed) in PORTRAITS.items():
        write_image(folder / f"portrait_{name}.png", portrait(people, seed))
    for name, (person, seed) in DRIVERS.items():
        motion = turned(random_motion(FRAMES, seed, FPS), HEAD)
        write_video(folder / f"driver_{name}.mp4", render_face(Identity.sample(1, person), motion, HEIGHT), FPS, metadata={"comment": "synthetic, made by tools/make_samples.py"})
        curves = {factor: [round(x, 4) for x in getattr(motion, factor).tolist()] for factor in motion.names()}
        (folder / f"driver_{name}.json").write_text(json.dumps(curves) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
