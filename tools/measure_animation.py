"""What do the weights do on people and motions that they have never seen? `python tools/measure_animation.py --weights tiny mini`

Parts (`--parts`, default all but painter and ears):
  pictures   PSNR against the true film, between the portrait held still (floor) and the VAE's own reconstruction (ceiling); one, two and three people
  following  r of drivers' true curves with what is measured in the films, own driver and others', pooled over all clips (each curve minus its mean in the clip); drivers swapped; true films for comparison
  painter    a bound: somebody who draws the scene exactly, and of the drivers hears nothing but what the encoder says; PSNR as in pictures (also with true heads, with everything true but heads, and averaged over what the heads may be)
  ears       is it the ear or the hand? PSNR as in pictures, with each driver's features as heard, and as the mean of sixteen drivers' who do the same
  steps      PSNR and seconds against solver steps, guidance, its interval, draws, looks
  long       200 frames: background, identity (face shape and colour, against other people's) over time; as recommended, in windows, and naively chained
  real       real drivers (shared/real beside the repository) on drawn portraits: r of what MediaPipe reads in the driver with what it reads in the film; films, and contact sheets that show the driver, into --out
  time       seconds, peak memory and the share spent outside of the DiT, 16 frames of one and of two people

Scenes come from `SceneClips` under a seed that training does not use; features from drivers drawn and cropped as in training (whole; `real` cuts them as the weights recommend); films as the weights recommend (pipeline.json)."""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from fantasy_nb.animate import PortraitPipeline, to_pixels
from fantasy_nb.core import data_samples, default_device, write_image
from fantasy_nb.data import ClipConfig, SceneClips, jittered_crops, livelier, turned, zoom_in
from fantasy_nb.exprbench import MOVING
from fantasy_nb.expression import ExpressionEncoder, Features, fit_ruler
from fantasy_nb.faces import EMOTIONS, Expression, Identity, Scene, random_motion, render_crops, render_scene
from fantasy_nb.tracking import align_crop, head_pose, measure_expression, track_faces

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
SEED = 424_242  # of scenes; training uses 0 and 1, its sample sheets 999
FACTORS = {"yaw": "head", "pitch": "head", "roll": "head", "mouth_open": "mouth", "smile": "mouth", "blink": "eyes", "gaze_x": "eyes"}


def curve_of(motion: Expression, name: str) -> np.ndarray:
    "A true factor over time; blink is the mean of both lids."
    return ((motion.blink_left + motion.blink_right) / 2 if name == "blink" else getattr(motion, name)).cpu().numpy()


class Weights:
    "A pipeline, and scenes of the shape it was taught with."

    def __init__(self, name: str, device):
        self.name, self.pipeline = Path(name).name, PortraitPipeline.from_pretrained(name, device)
        self.settings, self.device = self.pipeline.settings, torch.device(device)
        self.height = round(self.settings.face_height / 0.742 / 16) * 16

    def clips(self, people: int, frames: int) -> SceneClips:
        return SceneClips(ClipConfig(frames=frames, height=self.height, crop=self.settings.crop, closer=self.settings.closer, people=(people,), whole=()), SEED + people, device=self.device)

    @torch.no_grad()
    def read(self, clip):  # -> video (1 3 f h w), features (p f 554), boxes of the portrait (p 4)
        "What the network is given, and what is true."
        video = clip.frames.transpose(0, 1)[None].to(self.device) / 127.5 - 1
        features = torch.stack([self.pipeline.encoder(c.to(self.device) / 127.5 - 1).pack() for c in clip.crops])
        return video, features, clip.boxes[0]

    def film(self, video, features, boxes, how=None) -> np.ndarray:  # uint8 (f-1 h w 3)
        return self.pipeline.paint(video[:, :, :1], features, boxes, how or self.settings)

    @torch.no_grad()
    def reconstructed(self, video) -> np.ndarray:  # (1 3 f h w) -> uint8 (f-1 h w 3)
        "What the VAE makes of the truth (not enlarged): every frame by itself, or as one film, as the weights are used."
        vae = self.pipeline.vae
        if self.settings.window:
            return to_pixels(vae.decode(vae.encode(video))[:, :, 1:])
        return np.concatenate([to_pixels(vae.decode(vae.encode(x[:, :, None])).transpose(0, 2)) for x in video[0, :, 1:].transpose(0, 1).split(8)])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.square(a.astype(np.float32) - b).mean())


def true_frames(video) -> np.ndarray:
    return to_pixels(video[:, :, 1:])


# pictures and following share their films


def pictures_and_following(weights: Weights, counts: dict[int, int], frames: int, parts: set, reader_from: Path | None = None) -> None:
    "Print both tables."
    readers = {"MediaPipe": lambda track, film: measure_expression(track)} | ({"encoder": encoder_reader(weights, reader_from)} if "following" in parts else {})
    for people, count in counts.items():
        rows, seen, lost = [], defaultdict(list), 0
        clips = weights.clips(people, frames)
        for k in tqdm(range(count), desc=f"{weights.name}, {people} people", unit="clip"):
            clip = clips[k]
            video, features, boxes = weights.read(clip)
            truth, made = true_frames(video), weights.film(video, features, boxes)
            still = np.repeat(to_pixels(video[:, :, :1]), len(truth), 0)
            spans = torch.cat([clip.boxes[1:].amin(0)[:, :2].clamp(min=0), clip.boxes[1:].amax(0)[:, 2:]], 1).round().int().tolist()
            faces = [np.s_[:, y0:y1, x0:x1] for x0, y0, x1, y1 in spans]
            tells = [still, made, weights.reconstructed(video)]
            rows.append([psnr(x, truth) for x in tells] + [np.mean([psnr(x[face], truth[face]) for face in faces]) for x in tells])
            if "following" not in parts:
                continue
            films = {"made": made, "true": truth} | ({"swapped": weights.film(video, torch.cat([features[:, :1], features.roll(1, 0)[:, 1:]], 1), boxes)} if people == 2 else {})
            for name, film in films.items():
                tracks = track_faces(film, people)
                if len(tracks) < people:
                    lost += name == "made"
                    continue
                for reader, read in readers.items():
                    said = [read(track, film) for track in tracks]
                    for factor in FACTORS:
                        for j in range(people):
                            for i in range(people):
                                curve = curve_of(clip.motions[i], factor)[1:]
                                value = np.asarray(said[j][factor])
                                seen[reader, name, factor, "own" if i == j else "other"].append((curve - curve.mean(), value - value.mean()))
        mean = np.mean(rows, 0)
        share = lambda row: (row[1] - row[0]) / (row[2] - row[0])  # noqa: E731
        print(f"\n{weights.name}, {people} people, {count} clips of {frames - 1} frames, PSNR: portrait held {mean[0]:.2f}, film {mean[1]:.2f}, VAE {mean[2]:.2f} dB: {share(mean[:3]):.0%} of the way; in faces {mean[3]:.2f}, {mean[4]:.2f}, {mean[5]:.2f} dB: {share(mean[3:]):.0%}" + (f"; films in which somebody was lost: {lost} of {count}" if "following" in parts else ""))
        if seen:
            print_following(seen, people)


def pooled(pairs) -> float:
    return np.corrcoef(np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]))[0, 1]


def print_following(seen: dict, people: int) -> None:
    columns = [("made", "own"), ("true", "own")] + [("made", "other"), ("true", "other")] * (people > 1) + [("swapped", "own"), ("swapped", "other")] * (people == 2)
    print(f"{'read by':12s}{'factor':12s}" + "".join(f"{a + ' ' + b:>15s}" for a, b in columns) + ("   (swapped: 'own' is the driver of before, 'other' the new one)" if people == 2 else ""))
    for reader in dict.fromkeys(key[0] for key in seen):
        for factor in FACTORS:
            print(f"{reader:12s}{factor:12s}" + "".join(f"{pooled(seen[reader, a, factor, b]):15.2f}" for a, b in columns))


@torch.no_grad()
def encoder_reader(weights: Weights, folder: Path | None = None, count: int = 1600, seed: int = 2001):
    "Straight lines, laid on drawn people, from the features of an encoder (chapter 03; None: the pipeline's own) to the factors."
    encoder = weights.pipeline.encoder if folder is None else ExpressionEncoder.from_pretrained(folder).to(weights.device).eval()
    size, known = encoder.config.image_size, Expression.sample(count, seed)
    crops = render_crops(Identity.sample(count, seed), known, size, closer=encoder.config.closer)
    features = Features.unpack(torch.cat([encoder(part.to(weights.device)).pack().cpu() for part in crops.split(100)]))
    rulers = {name: fit_ruler(getattr(features, group), torch.as_tensor(curve_of(known, name))[:, None]) for name, group in FACTORS.items()}

    @torch.no_grad()
    def read(track, film):
        row = encoder(align_crop(film, track, size, encoder.config.keep_roll, encoder.config.closer).to(weights.device))
        return {name: rulers[name](getattr(row, group).cpu())[:, 0] for name, group in FACTORS.items()}

    return read


# what a perfect painter could do


def squares(x: torch.Tensor) -> torch.Tensor:  # (n d) -> (n d + d(d+1)/2)
    "With their products: yaw is no straight line in the features."
    i, j = torch.triu_indices(x.shape[1], x.shape[1])
    return torch.cat([x, x[:, i] * x[:, j]], 1)


@torch.no_grad()
def painter_reader(encoder: ExpressionEncoder, count: int = 240, seed: int = 77_000):
    "Features (n 554) -> all true factors (n 17), by parabolas fitted on drivers drawn and cropped as for stills; and how far off it is (root mean squares, on a sixth of the drivers that it was not fitted on)."
    config, features, known, names = encoder.config, [], [], Expression.names()
    for k in range(count):
        g = torch.Generator().manual_seed(k)
        motion = Expression.cat([random_motion(9, (seed + k) * 100 + j, 25.0)[4] for j in range(24)])
        motion = livelier(turned(motion, 0.1 + 0.7 * torch.rand(24, generator=g)), g, True)
        crops = torch.cat([jittered_crops(motion[3 * j : 3 * j + 3], config.image_size, k * 100 + j, config.closer) for j in range(8)])
        features.append(encoder(crops.to(next(encoder.parameters()).device) / 127.5 - 1).pack().cpu())
        known.append(torch.stack([getattr(motion, name) for name in names], -1))
    x, y, n = torch.cat(features), torch.cat(known), 20 * count  # of 24 moments each
    axes = {}  # of each group, the few along which its features move at all
    for name, value in vars(Features.unpack(x)).items():
        _, sizes, ways = torch.linalg.svd(value - value.mean(0), full_matrices=False)
        axes[name] = ways[(sizes > 0.02 * sizes[0])][:20].T / sizes[0] * len(x) ** 0.5
    told = lambda packed: {name: squares(value @ axes[name]) for name, value in vars(Features.unpack(packed)).items()}  # noqa: E731
    rulers = {name: fit_ruler(value[:n], y[:n], 3.0) for name, value in told(x).items()}
    group_of = ["emotion" if name in EMOTIONS else next(g for g, members in Expression.GROUPS.items() if name in members) for name in names]

    def read(packed):
        said = {name: rulers[name](value) for name, value in told(packed.cpu()).items()}
        return torch.stack([said[group][:, k] for k, group in enumerate(group_of)], -1).clamp(y.amin(0), y.amax(0))

    return read, (read(x[n:]) - y[n:]).square().mean(0).sqrt()


@torch.no_grad()
def painter(weights: Weights, counts: dict[int, int], frames: int, copies: int = 6) -> None:
    "Print the bound and what limits it."
    names, heads = Expression.names(), slice(0, 3)
    read, off = painter_reader(weights.pipeline.encoder)
    print(f"\n{weights.name}: the encoder's heads are read {', '.join(f'{name} {x:.2f}' for name, x in zip(names[:3], off))} degrees off (root mean squares)")
    g = torch.Generator().manual_seed(0)
    for people, count in counts.items():
        clips, rows = weights.clips(people, frames), defaultdict(list)
        for k in tqdm(range(count), desc=f"painter, {people} people", unit="clip"):
            clip = clips[k]
            video, features, _ = weights.read(clip)
            truth, (p, size, zoom) = true_frames(video), clips.config.view(k)
            scene = zoom_in(Scene.sample(p, (clips.seed * 1_000_003 + k) * 64 + 1), zoom)
            true = [torch.stack([getattr(motion, name) for name in names], -1).cpu() for motion in clip.motions]
            heard = [read(one) for one in features]

            def draw(told, scene=scene, size=size):
                pictures, _, _ = render_scene(scene, [Expression(**dict(zip(names, one.T))) for one in told], size)
                return pictures[1:].permute(0, 2, 3, 1).numpy() * 255

            def blend(ours, theirs):
                return [torch.cat([b[:, heads], a[:, 3:]], 1) for a, b in zip(ours, theirs)]

            unsure = lambda one: torch.cat([one[:, heads] + off[heads] * torch.randn(len(one), 3, generator=g), one[:, 3:]], 1)  # noqa: E731
            still = np.repeat(to_pixels(video[:, :, :1]), len(truth), 0)
            films = {"still": still, "vae": weights.reconstructed(video), "as heard": draw(heard), "true heads, else as heard": draw(blend(heard, true)), "heads as heard, else true": draw(blend(true, heard))}
            films["averaged over heads"] = np.mean([draw([unsure(one) for one in heard]) for _ in range(copies)], 0)
            for name, film in films.items():
                rows[name].append(psnr(film, truth))
        low, high = np.mean(rows.pop("still")), np.mean(rows.pop("vae"))
        told = ", ".join(f"{name} {np.mean(x):.2f} dB ({(np.mean(x) - low) / (high - low):.0%})" for name, x in rows.items())
        print(f"{weights.name}, {people} people, {count} clips of {frames - 1} frames: portrait held {low:.2f}, VAE {high:.2f}; a painter who knows the scene: {told}", flush=True)


@torch.no_grad()
def ears(weights: Weights, counts: dict[int, int], frames: int, many: int = 16) -> None:
    "Print how much films gain if what is heard of a performance is the mean of many drivers who perform it."
    encoder = weights.pipeline.encoder
    for people, count in counts.items():
        clips, rows = weights.clips(people, frames), []
        for k in tqdm(range(count), desc=f"ears, {people} people", unit="clip"):
            clip = clips[k]
            video, features, boxes = weights.read(clip)
            said = [[encoder(jittered_crops(motion, encoder.config.image_size, 64 * k + 16 * j + n, encoder.config.closer).to(weights.device) / 127.5 - 1).pack() for n in range(many)] for j, motion in enumerate(clip.motions)]
            mean = torch.stack([torch.stack(each).mean(0) for each in said])
            truth, still = true_frames(video), np.repeat(to_pixels(video[:, :, :1]), frames - 1, 0)
            rows.append([psnr(film, truth) for film in (still, weights.film(video, features, boxes), weights.film(video, mean, boxes), weights.reconstructed(video))])
        low, one, mean, high = np.mean(rows, 0)
        told = [f"{x:.2f} dB ({(x - low) / (high - low):.1%})" for x in (one, mean)]
        print(f"{weights.name}, {people} people, {count} clips of {frames - 1} frames: portrait held {low:.2f}, VAE {high:.2f}; one driver heard {told[0]}, {many} who do the same {told[1]}", flush=True)


# steps, guidance, draws, looks


def steps(weights: Weights, count: int = 8, frames: int = 9) -> None:
    "Print quality and time for ways to sample."
    clips = [weights.read(weights.clips(2, frames)[k]) for k in range(count)]
    ways = [dict(steps=n) for n in (1, 4, 8, 15, 30)] + [dict(steps=8, guidance=g) for g in (1.5, 2.5)] + [dict(steps=8, guidance=2.5, interval=i) for i in ((0.0, 0.8), (0.3, 0.8), (0.8, 1.0))]
    ways += [dict(steps=1, draws=n) for n in (3, 6)] + [dict(steps=4, solver="multistep"), dict(steps=4, solver="heun")]
    ways += [dict(steps=1, looks=n) for n in (2, 4)] + [dict(steps=1, looks=n, detail=1.0) for n in (1, 2, 4)]
    weights.film(*clips[0])  # the first one pays for what is built once
    print(f"\n{weights.name}, {count} clips of two people, {frames - 1} frames: PSNR, seconds a clip")
    for way in ways:
        how, spent, values = replace(weights.settings, **(dict(steps=1, draws=1, looks=1, guidance=1.0, detail=0.0) | way)), 0.0, []
        for video, features, boxes in clips:
            began = time.perf_counter()
            film = weights.film(video, features, boxes, how)
            spent += time.perf_counter() - began
            values.append(psnr(film, true_frames(video)))
        print(f"{str(way):60s}{np.mean(values):7.2f} dB{spent / count:8.2f} s", flush=True)


# two hundred frames


def colours(frame: np.ndarray, xy: np.ndarray) -> np.ndarray:  # (h w 3), (... 2) -> (... 3)
    "At places in pixels; beyond the edge, of the edge."
    h, w = frame.shape[:2]
    return frame[np.clip(xy[..., 1].round().astype(int), 0, h - 1), np.clip(xy[..., 0].round().astype(int), 0, w - 1)].astype(float)


def face_signature(film: np.ndarray, tracks) -> np.ndarray:  # (p f d)
    "Face shape (landmarks in the face's own frame, those that hardly move) and colour (skin at these landmarks, hair above)."
    keep = [k for k in range(0, 468, 4) if k not in MOVING]
    rows = []
    for track in tracks:
        shape = head_pose(track)[1][:, keep, :2].flatten(1).numpy()
        places = np.asarray(track.landmarks)[:, :468, :2]
        top, chin = places[:, 10], places[:, 152]
        hair = top + (top - chin) * 0.12
        skin = np.stack([colours(frame, xy[keep]).mean(0) for frame, xy in zip(film, places)]) / 255
        above = np.stack([colours(frame, xy) for frame, xy in zip(film, hair)]) / 255
        rows.append(np.concatenate([shape, skin, above], 1))
    return np.stack(rows)


def within_people(rows: list[np.ndarray]) -> np.ndarray:  # of (f d) each -> (d,)
    "How much a signature varies while the person stays the same."
    return np.sqrt(np.mean([row.var(0) for row in rows], 0)) + 1e-6


def performed(scene: Scene, motions: list[Expression], size) -> np.ndarray:  # uint8 (f h w 3)
    "As the renderer draws it."
    return to_pixels(render_scene(scene, motions, size)[0].transpose(0, 1)[None] * 2 - 1)


def long(weights: Weights, frames: int = 201, others: int = 50, seed: int = SEED + 77) -> None:
    "Print errors over time of one scene of two people, 200 frames."
    device = weights.device
    _, size, zoom = replace(weights.clips(2, 9).config, people=(2,), whole=(0,)).view(0)  # the larger picture of training, with some wall around the people
    place, clips = zoom_in(Scene.sample(2, seed), zoom), weights.clips(2, 9)
    motions = [Expression.cat([clips.motion(seed + 8 * j)[:1], random_motion(frames - 1, seed + j, 25.0)]) for j in (0, 1)]
    motions = [m.replace(yaw=0.5 * m.yaw, pitch=0.5 * m.pitch, roll=0.5 * m.roll) for m in motions]
    drawn, boxes, _ = render_scene(place, motions, size)
    video = (drawn.transpose(0, 1)[None] * 2 - 1).to(device)
    with torch.no_grad():
        crops = [render_crops(Identity.sample(1, 31 + j), m, weights.settings.crop, closer=weights.settings.closer) for j, m in enumerate(motions)]
        features = torch.stack([torch.cat([weights.pipeline.encoder(part.to(device)).pack() for part in c.split(64)]) for c in crops])
    truth, gallery = true_frames(video), []
    for k in tqdm(range(others), desc="other people", unit="scene"):
        ones = [random_motion(160, seed + 900 + 2 * k + j, 25.0)[::20] for j in (0, 1)]
        pictures = performed(zoom_in(Scene.sample(2, seed + 1000 + k), zoom), [m.replace(yaw=0.5 * m.yaw, pitch=0.5 * m.pitch, roll=0.5 * m.roll) for m in ones], size)
        tracks = track_faces(pictures, 2)
        gallery += list(face_signature(pictures, tracks)) if len(tracks) == 2 else []
    steady, gallery = within_people(gallery), np.stack([row.mean(0) for row in gallery])
    own = [x.mean(0) for x in face_signature(truth, track_faces(truth, 2))]

    def chained(how):
        "Eight frames at a time, each piece from the last frame of the one before."
        pieces, start = [], video[:, :, :1]
        for k in range(1, frames, 8):
            pieces.append(weights.film(start, torch.cat([features[:, k - 1 : k], features[:, k : k + 8]], 1), boxes[0], how))
            start = torch.from_numpy(pieces[-1][-1:]).permute(3, 0, 1, 2)[None].to(device) / 127.5 - 1
        return np.concatenate(pieces)

    windows = replace(weights.settings, window=2, overlap=1)
    films = {"as recommended": lambda: weights.film(video, features, boxes[0]), "in windows": lambda: weights.film(video, features, boxes[0], windows)}
    films |= {"chained, as recommended": lambda: chained(weights.settings), "chained windows": lambda: chained(windows), "true film": lambda: truth}
    outside = np.abs(truth.astype(int) - truth[:1]).max((0, 3)) < 4  # where nothing moves in the true film
    print(f"\n{weights.name}, {frames - 1} frames of two people in {size[0]}x{size[1]} pixels, forty frames a column: PSNR; background, root mean square error in grey levels where nothing moves ({outside.mean():.0%} of the picture); identity, the people nearest to themselves of {len(gallery) + 1} (out of two), and how far from themselves as a share of the distance to the nearest other")
    print(f"{'':28s}" + "".join(f"{f'{a} to {a + 40}':>24s}" for a in range(0, frames - 1, 40)))
    for name, make in films.items():
        film, cells = make(), []
        for part in (np.s_[a : a + 40] for a in range(0, frames - 1, 40)):
            error = np.sqrt(np.square(film[part].astype(np.float32) - truth[part])[:, outside].mean())
            quality = "true" if film is truth else f"{psnr(film[part], truth[part]):.1f}"
            tracks = track_faces(film[part], 2)
            if len(tracks) < 2:
                cells.append(f"{quality} {error:.2f} faces lost")
                continue
            seen = [row.mean(0) for row in face_signature(film[part], tracks)]
            mine = [np.square((x - o) / steady).mean() ** 0.5 for x, o in zip(seen, own)]
            theirs = [(np.square((x - gallery) / steady).mean(1) ** 0.5).min() for x in seen]
            cells.append(f"{quality} {error:.2f} {sum(a < b for a, b in zip(mine, theirs))} {np.mean(np.array(mine) / theirs):.2f}")
        print(f"{name:28s}" + "".join(f"{cell:>24s}" for cell in cells), flush=True)


# real drivers


def real(weights: Weights, folder: Path, out: Path | None) -> None:
    """Print r of driver and film, both by MediaPipe. The film of one man drives six drawn people, one in two films, three in the last: one person's r is a draw of the lot (glasses,
    beards, soft pictures), the median is not."""
    names = ("yaw", "pitch", "roll", "mouth_open", "smile", "blink")
    casts = [(f"portrait_{word}.png", "biden.mp4", people, 1) for people, word in enumerate(("one", "two", "three"), 1)] + [("portrait_two.png", "two_person.mp4", 2, 2)]
    followed = []
    for portrait, driver, people, performers in casts:
        film = weights.pipeline(data_samples(portrait), [str(folder / driver)] * (people if performers == 1 else 1), frames=100, show=False)
        tracks = track_faces(film.frames, people)
        if out:
            write_image(out / f"{weights.name}-{Path(driver).stem}-{people}.png", film.sheet())
            film.save(out / f"{weights.name}-{Path(driver).stem}-{people}.mp4", height=256)
        for k, (track, source) in enumerate(zip(tracks, film.tracks), 1):
            said, meant = measure_expression(track), measure_expression(source)
            row = [float(np.corrcoef(meant[name], said[name])[0, 1]) for name in names]
            print(f"{weights.name}: {driver} drives person {k} of {portrait}, {len(film.frames)} frames: " + ", ".join(f"{name} {r:.2f}" for name, r in zip(names, row)), flush=True)
            if performers == 1:
                followed.append(row)
    print(f"{weights.name}: median of {len(followed)} people driven by biden.mp4: " + ", ".join(f"{name} {r:.2f}" for name, r in zip(names, np.median(followed, 0))), flush=True)


# time and memory


def time_one(name: str, people: int, device: str, changed: dict) -> None:
    "In a process of its own: print seconds, the DiT's share, peak memory."
    began = time.perf_counter()
    pipeline = PortraitPipeline.from_pretrained(name, device)
    pipeline.settings = replace(pipeline.settings, **changed)
    loaded, inside = time.perf_counter() - began, [0.0]
    forward, wait = pipeline.animator.dit.forward, getattr(torch, device.split(":")[0]).synchronize

    def timed(*args, **kwargs):
        wait()  # what was asked of the encoder and VAE before is not the DiT's
        start = time.perf_counter()
        answer = forward(*args, **kwargs)
        wait()
        inside[0] += time.perf_counter() - start
        return answer

    pipeline.animator.dit.forward = timed
    portrait, drivers = data_samples(f"portrait_{'one' if people == 1 else 'two'}.png"), [data_samples(f"driver_{k}.mp4") for k in "ab"[:people]]
    pipeline(portrait, drivers, frames=4, show=False)  # the first call builds the tracker
    spent = []
    for _ in range(3):
        inside[0], start = 0.0, time.perf_counter()
        pipeline(portrait, drivers, frames=16, show=False)
        spent.append((time.perf_counter() - start, inside[0]))
    total, dit = min(spent)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{Path(name).name}, 16 frames and the portrait of {people} people on {device} ({torch.get_num_threads()} threads): {total:.2f} s (weights loaded in {loaded:.1f} s), {1 - dit / total:.0%} of it outside of the DiT; at most {peak:.2f} GiB", flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("measure_animation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("pictures", "following", "painter", "ears", "steps", "long", "real", "time")
    parser.add_argument("--weights", nargs="+", default=["tiny", "mini"], help="shipped names or folders")
    parser.add_argument("--parts", nargs="+", choices=parts, default=[part for part in parts if part not in ("painter", "ears")])
    parser.add_argument("--clips", type=int, nargs=3, default=[64, 32, 16], metavar="N", help="clips of one, two, three people (default: 64 32 16)")
    parser.add_argument("--frames", type=int, default=49, help="of these clips, 4n+1 (default: 49)")
    parser.add_argument("--real", type=Path, help="folder with biden.mp4 and two_person.mp4 (default: shared/real beside the repository)")
    parser.add_argument("--out", type=Path, help="folder for contact sheets and films")
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help='settings to change, e.g. \'{"draws": 1}\'')
    parser.add_argument("--reader", type=Path, help="folder of the encoder that reads the films (default: the one that each of --weights listens to; name one to compare weights that listen to different ones)")
    parser.add_argument("--time-one", type=int, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    args = build_parser().parse_args()
    device, folder = str(default_device()), args.real or REAL
    if args.real and not args.real.is_dir():
        sys.exit(f"want a folder for --real, got {args.real}")
    for name in args.weights:
        if args.time_one:
            time_one(name, args.time_one, device, args.set)
            continue
        weights, parts = Weights(name, device), set(args.parts)
        weights.settings = weights.pipeline.settings = replace(weights.settings, **args.set)
        if parts & {"pictures", "following"}:
            pictures_and_following(weights, {p: n for p, n in enumerate(args.clips, 1) if n}, args.frames, parts, args.reader)
        if "painter" in parts:
            painter(weights, {p: n for p, n in enumerate(args.clips, 1) if n}, args.frames)
        if "ears" in parts:
            ears(weights, {p: n for p, n in enumerate(args.clips, 1) if n}, args.frames)
        if "steps" in parts:
            steps(weights)
        if "long" in parts:
            long(weights)
        if "real" in parts and not folder.is_dir():
            print(f"{weights.name}: no real drivers, for there is no {folder}", flush=True)
        elif "real" in parts:
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
            real(weights, folder, args.out)
        if "time" in parts:
            for people in (1, 2):
                subprocess.run([sys.executable, __file__, "--weights", name, "--time-one", str(people), "--set", json.dumps(args.set)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
