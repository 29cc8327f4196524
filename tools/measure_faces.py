"""Can a tracker that never saw our people find and read them? `python tools/measure_faces.py` prints the table of LOG.md.

1. faces found in 200 random people, in 40 scenes of two, on 40 bare backgrounds (single-image mode, 256 px)
2. within one identity (mean over ten), the correlation of MediaPipe's measure with the true factor, each factor swept alone, and all factors at random
3. frames a second of the renderer"""

import argparse
import time

import numpy as np
import torch

from fantasy_nb.faces import Expression, Identity, Scene, paint_background, pixel_grid, render_face, render_scene
from fantasy_nb.tracking import measure_expression, track_faces

SWEEPS = {"yaw": (-35, 35), "pitch": (-15, 15), "roll": (-15, 15), "gaze_x": (-1, 1), "gaze_y": (-1, 1), "blink": (0, 1), "mouth_open": (0, 1), "smile": (-0.5, 1)}


def found(pictures, most):
    "Number of faces in each picture."
    return np.array([len(track_faces(picture[None], most)) for picture in pictures])


def detection(people=200, scenes=40):
    "Shares of pictures in which as many faces are found as there are."
    crowd = render_face(Identity.sample(people, 70), Expression.sample(people, 71), 256)
    pairs = [render_scene(Scene.sample(2, 500 + k), [Expression.sample(1, 2 * k), Expression.sample(1, 2 * k + 1)], (256, 384))[0][0] for k in range(scenes)]
    walls = paint_background(Identity.sample(scenes, 9), *pixel_grid(256, 256))
    return (found(crowd, 2) == 1).mean(), (found(pairs, 3) == 2).mean(), (found(walls, 2) > 0).mean()


def sweep(identity, name, steps=15):
    "r of the measured with the true factor, that factor alone moving."
    values = torch.linspace(*SWEEPS[name], steps)
    factors = {"blink_left": values, "blink_right": values} if name == "blink" else {name: values}
    frames = render_face(identity, Expression.neutral(steps, **factors), 256)
    return np.corrcoef(measure_expression(track_faces(frames, 1)[0])[name].numpy(), values.numpy())[0, 1]


def at_random(identity, seed, count=60):
    "r for every factor, all factors moving at once."
    expression = Expression.sample(count, seed)
    seen, ok = {n: [] for n in SWEEPS}, []
    for k, frame in enumerate(render_face(identity, expression, 256)):
        tracks = track_faces(frame[None], 1)
        if tracks:
            ok.append(k)
            measured = measure_expression(tracks[0])
            for name in SWEEPS:
                seen[name].append(measured[name][0].item())
    return [np.corrcoef(seen[n], getattr(expression, n).numpy()[ok])[0, 1] for n in SWEEPS]


def rates(device="cpu"):
    "Frames a second at 64, 128 and 256 pixels."
    count = 64 if device == "cpu" else 512
    i, e, rows = Identity.sample(count, 0).to(device), Expression.sample(count, 0).to(device), {}
    for size in (64, 128, 256):
        render_face(i[:4], e[:4], size)
        start = time.perf_counter()
        render_face(i, e, size).sum().item()
        rows[size] = count / (time.perf_counter() - start)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--identities", type=int, default=10)
    args = parser.parse_args()
    print("found: one face in {:.1%} of 200 people, two in {:.1%} of 40 pairs, any on {:.1%} of 40 bare walls".format(*detection()), flush=True)
    people = [Identity.sample(1, 1000 + k) for k in range(args.identities)]
    alone = np.array([[sweep(person, name) for name in SWEEPS] for person in people])
    print("factor      " + "".join(f"{name:>11s}" for name in SWEEPS))
    print("swept alone " + "".join(f"{r:11.3f}" for r in alone.mean(0)), " worst identity " + "".join(f"{r:7.2f}" for r in alone.min(0)), flush=True)
    together = np.array([at_random(person, 2000 + k) for k, person in enumerate(people)])
    print("all at once " + "".join(f"{r:11.3f}" for r in together.mean(0)), flush=True)
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        print(device, {size: round(rate, 1) for size, rate in rates(device).items()}, "frames a second,", torch.get_num_threads(), "threads")


if __name__ == "__main__":
    main()
