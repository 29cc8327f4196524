"""Do the generated people follow their own driver, and only theirs? `python tools/measure_following.py` prints the table of LOG.md.

For each person: r of the driver's *true* curve with what MediaPipe measures in the generated film; the same with the other driver's curve; and the two drivers'
curves among themselves (what a perfect system would show in the second column). The instrument's own ceiling: the true film of the performance, measured alike.

What is left in the second column may be chance (two smooth curves of three seconds resemble each other) or a leak. So each person is also filmed with every other driver at the
partner: how much of a curve's variance does the partner's driver cause, and is r with a driver larger when they are in the film than when they are not?

Four instruments: MediaPipe's distances (`measure_expression`), MediaPipe's landmarks read by lines laid on *blurred* drawings of other people, chapter 03's encoder, and the pixels."""

import argparse
import json
from functools import cache
from itertools import product

import cv2
import numpy as np
import torch
from tqdm.auto import tqdm

from fantasy_nb.animate import PortraitPipeline
from fantasy_nb.core import data_samples, read_image
from fantasy_nb.data import turned, zoom_in
from fantasy_nb.expression import Features, fit_ruler
from fantasy_nb.faces import Expression, Identity, Scene, random_motion, render_crops, render_scene
from fantasy_nb.tracking import align_crop, head_pose, measure_expression, track_faces

FACTORS = {"yaw": "head", "pitch": "head", "roll": "head", "smile": "mouth", "mouth_open": "mouth", "blink": "eyes", "gaze_x": "eyes"}  # and the encoder's group that reads each

IN_THE_FACE = ("smile", "mouth_open", "blink", "gaze_x")  # what is left when the head's pose is taken out


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


def blurred(frames, sigma):
    "A film, out of focus."
    return np.stack([cv2.GaussianBlur(x, (0, 0), sigma) for x in frames]) if sigma else frames


def mesh(track):
    "All landmarks (f 1434), the head's pose taken out, as differences from the person's mean: what the face *does*."
    face = head_pose(track)[1].flatten(1).float()
    return face - face.mean(0)


def calibrated_reader(scenes=100, unseen=20, frames=24, sigmas=(0.7, 1.0, 1.5), seed=7001):
    """A function like `measured`: what straight lines read off all 478 landmarks, laid on true but blurred films of other people.

    In a blur MediaPipe's mesh opens its mouth less and elsewhere than in a sharp picture, but it still opens it. Prints r within people the lines have not seen."""
    seen = []
    for k in tqdm(range(scenes), desc="calibrating", unit="scene"):
        motions = [turned(random_motion(4 * frames, 2 * (seed + k) + j, 25)[::4], 0.5) for j in (0, 1)]
        film = render_scene(zoom_in(Scene.sample(2, seed + k), 1.5), motions, (64, 96))[0]
        for sigma in (0, *sigmas):
            try:
                tracks = tracked(blurred((film.permute(0, 2, 3, 1) * 255).byte().numpy(), sigma), 2)
            except ValueError:  # lost in the blur
                continue
            truth = [torch.stack([curve_of(m, name) for name in IN_THE_FACE], 1) for m in motions]
            seen += [(k, sigma, mesh(track), y - y.mean(0)) for track, y in zip(tracks, truth)]
    learned = [row for row in seen if row[0] < scenes - unseen and row[1]]
    ruler = fit_ruler(torch.cat([x for _, _, x, _ in learned]), torch.cat([y for *_, y in learned]), 3.0)
    for sigma in (0, *sigmas):
        rows = [[r(*pair) for pair in zip(ruler(x).T, y.T)] for k, s, x, y in seen if k >= scenes - unseen and s == sigma]
        print(f"blur of {sigma} pixels, {len(rows)} people not used: " + ", ".join(f"{name} {v:.2f}" for name, v in zip(IN_THE_FACE, np.nanmedian(rows, 0))))

    def read(frames, people):
        return [dict(zip(IN_THE_FACE, ruler(mesh(track)).T)) for track in tracked(frames, people)]

    return read


def curve_of(motion, name):
    "A factor's curve; blink is the mean of both lids."
    return (motion.blink_left + motion.blink_right) / 2 if name == "blink" else getattr(motion, name)


@torch.no_grad()
def encoder_reader(encoder, config, count=1600, seed=2001):
    "A function like `measured`: what straight lines, laid on drawn people, read off the encoder's features of a film's faces."
    known = Expression.sample(count, seed)
    crops = render_crops(Identity.sample(count, seed), known, config.crop, closer=config.closer)
    features = Features.unpack(torch.cat([encoder(part).pack() for part in crops.split(100)]))
    rulers = {name: fit_ruler(getattr(features, group), getattr(known, name)[:, None]) for name, group in FACTORS.items()}

    @torch.no_grad()
    def read(frames, people):
        rows = [encoder(align_crop(frames, track, config.crop, config.keep_roll, config.closer)) for track in tracked(frames, people)]
        return [{name: rulers[name](getattr(row, group))[:, 0] for name, group in FACTORS.items()} for row in rows]

    return read


def true_film(people, seed, names, size):
    "The performance as the renderer draws it on the portrait's people: the best any model could do at this size."
    motions = [Expression(**{k: torch.tensor(v, dtype=torch.float32) for k, v in curves(n).items() if k in Expression.names()}) for n in names]
    return render_scene(Scene.sample(people, seed), motions, size)[0]


def mouths(frames, box):
    "A little blurred, what lies in the lower half of a face box, one row a frame."
    x0, y0, x1, y1 = box
    w, h = x1 - x0, y1 - y0
    patch = frames[:, int(y0 + 0.5 * h) : int(y1 + 0.05 * h), int(x0 + 0.1 * w) : int(x1 - 0.1 * w)].astype(np.float32) / 255
    return torch.from_numpy(np.stack([cv2.GaussianBlur(x, (0, 0), 1.0) for x in patch])).flatten(1)


def mouth_ruler(drawn, opening, box):
    "From true drawings (n h w 3) of a person to a function: frames -> mouth_open."
    x = mouths(drawn, box)
    mean = x.mean(0)
    axes = torch.pca_lowrank(x - mean, 80, center=False)[2]

    def codes(frames):
        z = (mouths(frames, box) - mean) @ axes
        return torch.cat([z, (z[:, :12, None] * z[:, None, :12]).flatten(1)], 1)

    ruler = fit_ruler(codes(drawn), opening[:, None])
    return lambda frames: ruler(codes(frames))[:, 0]


def pixel_reader(people, seed, size, count=1200):
    "A function like `measured` that reads mouths only, by lines laid on pixels of true drawings of these people."
    motions = [Expression.sample(count, 5 + k) for k in range(people)]
    motions = [m.replace(yaw=0.4 * m.yaw, pitch=0.3 * m.pitch, roll=0.3 * m.roll) for m in motions]
    drawn, boxes, _ = render_scene(Scene.sample(people, seed), motions, size)
    drawn = (drawn.permute(0, 2, 3, 1) * 255).byte().numpy()
    rulers = [mouth_ruler(drawn, m.mouth_open, box) for m, box in zip(motions, boxes.mean(0).tolist())]
    return lambda frames, people: [{"mouth_open": ruler(frames)} for ruler in rulers]


def caused_by_partners(film_of, read_mouths, person, own, drivers="abcd"):
    "Print what changes in a person's curves (head by MediaPipe, mouth by `read_mouths`) when only the partner's driver does."
    partners = [name for name in drivers if name != own]
    films_of = [film_of((own, name) if person == 0 else (name, own)) for name in partners]
    seen = [measured(film, 2)[person] | read_mouths(film, 2)[person] for film in films_of]
    for factor in ("yaw", "roll", "mouth_open"):
        films = np.stack([np.asarray(one[factor]) for one in seen])
        share = films.var(0, ddof=1).mean() / films.mean(0).var()
        beyond = {}
        for i, name in enumerate(partners):  # the same curve in the film where this driver moves the partner, and in the two where they do not
            other, chance = curves(name)[factor], r(curves(name)[factor], curves(own)[factor])
            beyond[name] = r(other, films[i]) - chance, np.mean([r(other, films[j]) - chance for j in range(len(partners)) if j != i])
        print(f"person {person + 1} driven by {own}, {factor:10s}: partners cause {share:.3f} of the variance; excess of r with them in the film (and not in it): "
              + ", ".join(f"{name} {here:+.2f} ({absent:+.2f})" for name, (here, absent) in beyond.items()))  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="tiny")
    parser.add_argument("--pairs", nargs="+", default=["ab", "ba", "cd", "dc"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--window", type=int, help="0: every frame by itself")
    args = parser.parse_args()
    pipeline = PortraitPipeline.from_pretrained(args.weights)
    readers = {"MediaPipe": measured, "MediaPipe, calibrated": calibrated_reader(), "encoder": encoder_reader(pipeline.encoder, pipeline.settings)}
    tables = {reader: {} for reader in [*readers, "pixels"]}
    portrait, (people, seed) = read_image(data_samples("portrait_two.png")), (2, 9004)

    @cache
    def film_of(pair):
        return pipeline(portrait, [data_samples(f"driver_{k}.mp4") for k in pair], steps=args.steps, guidance=args.guidance, window=args.window, show=False).frames

    for pair in args.pairs:
        frames = film_of(tuple(pair))
        truth = (true_film(people, seed, pair, frames.shape[1:3]).permute(0, 2, 3, 1) * 255).byte().numpy()
        if "pixels" not in readers:
            readers["pixels"] = pixel_reader(people, seed, frames.shape[1:3])
        for reader, read in readers.items():
            seen, best = read(frames, 2), read(truth, 2)
            for name in seen[0].keys() & FACTORS.keys():
                for k in (0, 1):
                    own, other = (curves(pair[j])[name] for j in (k, 1 - k))
                    tables[reader][pair, name, k] = r(own, seen[k][name]), r(other, seen[k][name]), r(own, other), r(own, best[k][name])
    for reader, rows in tables.items():
        print(f"read by {reader}\n{'drivers, factor, person':28s}{'own':>8s}{'other':>8s}{'drivers':>9s}{'ceiling':>9s}")
        for (pair, name, k), values in sorted(rows.items()):
            print(f"{pair:4s}{name:14s}person {k + 1:<3d}" + "".join(f"{v:8.2f} " for v in values))
        for name in [n for n in FACTORS if any(n == row[1] for row in rows)]:
            mean = np.mean([v for (_, n, _), v in rows.items() if n == name], 0)
            worst = max(abs(v[1] - v[2]) for (_, n, _), v in rows.items() if n == name)
            print(f"mean {name:12s} own {mean[0]:.2f}, ceiling {mean[3]:.2f}; largest |other - drivers' own| {worst:.2f}")
    print("what the partner's driver causes (head by MediaPipe, mouth by pixels)")
    for person, own in product((0, 1), "abcd"):
        caused_by_partners(film_of, readers["pixels"], person, own)


if __name__ == "__main__":
    main()
