"""How much of a face do the features tell? `python tools/measure_bound.py` prints a table (a quarter of an hour on two cores).

One scene only, the demo's. An MLP learns to map both people's features to the scene's latents, on thousands of drawn moments of this very scene, and is judged on moments it
has not seen. Not a bound for animators, who learn from more moments than these: compare the rows, where nothing differs but the features. They come from drivers who are

    true      no pictures at all: the true factors
    same      always the same person, the crop exact
    exact     somebody else each time, the crop exact
    measured  the crop as far off as chapter 09 has measured the tracker to be
    guessed   the crop as far off as was once believed (.02 of its side)

Errors are squared differences of pixels, as shares of the portrait held still, in mouths and in faces as chapter 10's `place_weight` sees them. Beside them r of the drivers'
true curves with what MediaPipe measures in the film so drawn of the first two drivers: what the instrument makes of such films."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from measure_following import curves, measured, r
from torch import nn

from fantasy_nb.animate import resize
from fantasy_nb.core import data_samples, read_image
from fantasy_nb.data import livelier, turned
from fantasy_nb.expression import ExpressionEncoder
from fantasy_nb.faces import Expression, Identity, Scene, random_motion, render_crops, render_scene
from fantasy_nb.train import channel_weights, place_weight
from fantasy_nb.vae import VideoVAE

KINDS = {"true": None, "same": (0, 0), "exact": (0, 0), "measured": (0.0042, 0.018), "guessed": (0.021, 0.041)}  # deviation of shift and of zoom
PEOPLE, SEED = 2, 9004  # the scene of portrait_two.png


def moments(count, seed):
    "As chapter 09's stills: unrelated moments of calm heads and lively mouths."
    g = torch.Generator().manual_seed(seed)
    drawn = Expression.cat([random_motion(9, seed * 100_000 + k, 25.0)[4] for k in range(count)])
    return livelier(turned(drawn, 0.1 + 0.7 * torch.rand(count, generator=g)), g, True)


def factors(motion):
    return torch.stack([getattr(motion, name) for name in Expression.names()], -1)


def features(encoder, motion, kind, seed, alone=False):
    "What drivers of a kind tell the animator; `alone`: one driver performs all of it."
    if kind == "true":
        return factors(motion)
    n, g, (shift, zoom) = len(motion), torch.Generator().manual_seed(seed), KINDS[kind]
    people = Identity.sample(1, seed).repeat(n) if alone or kind == "same" else Identity.sample(n, seed)
    shifts, zooms = shift * torch.randn(n, 2, generator=g), 1 + zoom * torch.randn(n, generator=g)
    crops = render_crops(people, motion, encoder.config.image_size, encoder.config.closer * shifts, zooms, encoder.config.closer)
    crops = ((crops + 1) * 127.5).round() / 127.5 - 1
    return torch.cat([encoder(part).pack() for part in crops.split(100)])


def to_multiple(pictures):  # (n 3 h w) -> sides multiples of 16
    return F.pad(pictures, (0, -pictures.shape[-1] % 16, 0, -pictures.shape[-2] % 16), mode="replicate")


def encode(vae, pictures):  # (n 3 h w) in [0, 1] -> (n c h w)
    return torch.cat([vae.encode(to_multiple((part * 255).round() / 127.5 - 1)[:, :, None])[:, :, 0] for part in pictures.split(100)])


@torch.enable_grad()
def learn(x, z, weight, steps=2500):
    "An MLP from features to latents."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(x.shape[1], 512), nn.SiLU(), nn.Dropout(0.1), nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, z[0].numel()))
    optimizer, mean = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05), z.mean(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        i = torch.randint(len(x), (128,))
        loss = ((net(x[i]).view(-1, *mean.shape) + mean - z[i]).square() * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    return lambda x: net(x).view(-1, *mean.shape) + mean


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=data_samples("weights", "tiny"))
    parser.add_argument("--count", type=int, default=3000, help="moments of the scene, 200 of them held out")
    parser.add_argument("--steps", type=int, default=2500, help="of learning")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    args = parser.parse_args()
    vae, encoder = VideoVAE.from_pretrained(args.weights / "vae").eval(), ExpressionEncoder.from_pretrained(args.weights / "encoder").eval()
    size, held = (103, 155), args.count - 200
    motions = [moments(args.count, 31 + k) for k in range(PEOPLE)]
    scene, rows, boxes = Scene.sample(PEOPLE, SEED), [], None
    for i in range(0, args.count, 100):
        pictures, boxes, _ = render_scene(scene, [m[i : i + 100] for m in motions], size)
        rows.append(encode(vae, pictures))
    z, channels = torch.cat(rows), channel_weights(vae)[:, 0]
    place = place_weight(boxes.mean(0, keepdim=True), z.shape[-2:])[0]
    mouth, face, weight = (place - 4).clamp(min=0) * channels, (place - 1).clamp(0, 3) * channels, place * channels
    error = lambda x, w: (((x - z[held:]).square() * w).sum() / w.expand_as(z[held:]).sum()).item()
    portrait = encode(vae, torch.from_numpy(resize(read_image(data_samples("portrait_two.png")), size)).permute(2, 0, 1)[None] / 255)
    still = [error(portrait.expand_as(z[held:]), w) for w in (mouth, face)]
    print(f"portrait held: mouths {still[0]:.3f}, faces {still[1]:.3f}; below as shares of it\n{'features':12s}{'mouths':>8s}{'faces':>8s}   r by MediaPipe of the left and the right person", flush=True)
    drivers = [Expression(**{k: torch.tensor(v, dtype=torch.float32) for k, v in curves(n).items() if k in Expression.names()}) for n in "ab"]
    for kind in args.kinds:
        x = torch.cat([features(encoder, m, kind, 500 + k) for k, m in enumerate(motions)], 1)
        performed = torch.cat([features(encoder, m, kind, (500 if kind == "same" else 700) + k, alone=True) for k, m in enumerate(drivers)], 1)
        mean, scale = x[:held].mean(0), x[:held].std(0) + 1e-3
        draw = learn((x[:held] - mean) / scale, z[:held], weight / weight.mean(), args.steps)
        guess = draw((x[held:] - mean) / scale)
        film = vae.decode(draw((performed - mean) / scale)[:, :, None])[:, :, 0, : size[0], : size[1]]
        film = ((film.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        try:
            seen = measured(film, PEOPLE)
            said = ", ".join(f"{n} {r(curves('a')[n], seen[0][n]):.2f} {r(curves('b')[n], seen[1][n]):.2f}" for n in ("yaw", "mouth_open"))
        except ValueError as problem:
            said = str(problem)
        print(f"{kind:12s}{error(guess, mouth) / still[0]:8.2f}{error(guess, face) / still[1]:8.2f}   {said}", flush=True)


if __name__ == "__main__":
    main()
