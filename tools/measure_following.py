"""Do the generated people follow their own driver, and only theirs? `python tools/measure_following.py` prints the table of LOG.md.

For each person: r of the driver's *true* curve with what MediaPipe measures in the generated film; the same with the other driver's curve; and the two drivers'
curves among themselves (what a perfect system would show in the second column). The instrument's own ceiling: the true film of the performance, measured alike."""

import argparse
import json

import numpy as np
import torch

from fantasy_nb.animate import PortraitPipeline
from fantasy_nb.core import data_samples, read_image
from fantasy_nb.expression import Features, fit_ruler
from fantasy_nb.faces import Expression, Identity, Scene, render_crops, render_scene
from fantasy_nb.tracking import align_crop, measure_expression, track_faces

FACTORS = {"yaw": "head", "pitch": "head", "roll": "head", "smile": "mouth", "mouth_open": "mouth", "blink": "eyes", "gaze_x": "eyes"}  # and the encoder's group that reads each


def curves(name):
    "A driver's true factors."
    stored = {k: np.array(v) for k, v in json.loads(data_samples(f"driver_{name}.json").read_text()).items()}
    return stored | {"blink": (stored["blink_left"] + stored["blink_right"]) / 2}


def r(a, b):
    n = min(len(a), len(b))
    return np.corrcoef(np.asarray(a)[:n], np.asarray(b)[:n])[0, 1]


def tracked(frames, people):
    "Everybody in a film."
    tracks = track_faces(frames, people)
    if len(tracks) != people:
        raise ValueError(f"want {people} faces in the film, the tracker found {len(tracks)}")
    return tracks


def measured(frames, people):
    "MediaPipe's curves of everybody in a film."
    return [measure_expression(track) for track in tracked(frames, people)]


@torch.no_grad()
def encoder_reader(encoder, config, count=1600, seed=2001):
    "A function like `measured`: what straight lines, laid on drawn people, read off the encoder's features of a film's faces."
    known = Expression.sample(count, seed)
    crops = render_crops(Identity.sample(count, seed), known, config.crop)
    features = Features.unpack(torch.cat([encoder(part).pack() for part in crops.split(100)]))
    rulers = {name: fit_ruler(getattr(features, group), getattr(known, name)[:, None]) for name, group in FACTORS.items()}

    @torch.no_grad()
    def read(frames, people):
        rows = [encoder(align_crop(frames, track, config.crop, config.keep_roll)) for track in tracked(frames, people)]
        return [{name: rulers[name](getattr(row, group))[:, 0] for name, group in FACTORS.items()} for row in rows]

    return read


def true_film(people, seed, names, size):
    "The performance as the renderer draws it on the portrait's people: the best any model could do at this size."
    motions = [Expression(**{k: torch.tensor(v, dtype=torch.float32) for k, v in curves(n).items() if k in Expression.names()}) for n in names]
    return render_scene(Scene.sample(people, seed), motions, size)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="tiny")
    parser.add_argument("--pairs", nargs="+", default=["ab", "ba", "cd", "dc"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    args = parser.parse_args()
    pipeline = PortraitPipeline.from_pretrained(args.weights)
    readers = {"MediaPipe": measured, "encoder": encoder_reader(pipeline.encoder, pipeline.config)}
    tables = {reader: {} for reader in readers}
    portrait, (people, seed) = read_image(data_samples("portrait_two.png")), (2, 9004)
    for pair in args.pairs:
        film = pipeline(portrait, [data_samples(f"driver_{k}.mp4") for k in pair], steps=args.steps, guidance=args.guidance, show=False)
        truth = true_film(people, seed, pair, film.frames.shape[1:3])
        for reader, read in readers.items():
            seen, best = read(film.frames, 2), read(truth, 2)
            for name in FACTORS:
                for k in (0, 1):
                    own, other = (curves(pair[j])[name] for j in (k, 1 - k))
                    tables[reader][pair, name, k] = r(own, seen[k][name]), r(other, seen[k][name]), r(own, other), r(own, best[k][name])
    for reader, rows in tables.items():
        print(f"read by {reader}\n{'drivers, factor, person':28s}{'own':>8s}{'other':>8s}{'drivers':>9s}{'ceiling':>9s}")
        for (pair, name, k), values in rows.items():
            print(f"{pair:4s}{name:14s}person {k + 1:<3d}" + "".join(f"{v:8.2f} " for v in values))
        for name in FACTORS:
            mean = np.mean([v for (_, n, _), v in rows.items() if n == name], 0)
            worst = max(abs(v[1] - v[2]) for (_, n, _), v in rows.items() if n == name)
            print(f"mean {name:12s} own {mean[0]:.2f}, ceiling {mean[3]:.2f}; largest |other - drivers' own| {worst:.2f}")


if __name__ == "__main__":
    main()
