"""A new encoder for an animator that knows an old one: `python tools/hear_anew.py WEIGHTS NEW OUT`

An animator understands the features it was taught with and no others. What it makes of them begins with matrices (chapter 04: one for each group's linear token, one for the origin that is
added to it, one in front of each resampler), so a new encoder can be put in front of them: fit, by ridge regression on drawn people, old features = M new features + c, and multiply M and c into those matrices. The animator
then hears what it heard before, as nearly as the new features tell it, and `fantasy-train --init OUT --encoder NEW` teaches it to hear the rest. Writes dit/ and tokens/ into OUT; prints how
much of the old features' variance the new ones tell on faces that were not used."""

import argparse
from pathlib import Path

import torch
from tqdm.auto import tqdm

from fantasy_nb.expression import GROUPS, ExpressionEncoder, Features, as_bytes, as_crops
from fantasy_nb.faces import Expression, Identity, render_crops
from fantasy_nb.tokens import ExpressionTokens
from fantasy_nb.train import Animator


@torch.no_grad()
def features_of(encoder: ExpressionEncoder, people: Identity, moments: Expression) -> Features:  # (n 554)
    "The faces, cut out as this encoder wants them, and what it says of them."
    parts = tqdm(torch.arange(len(moments)).split(100), desc=f"faces of {encoder.config.image_size} pixels")
    size, closer = encoder.config.image_size, encoder.config.closer
    return Features.unpack(torch.cat([encoder(as_crops(as_bytes(render_crops(people[part], moments[part], size, closer=closer)))).pack() for part in parts]))


def fit_map(new: torch.Tensor, old: torch.Tensor, ridge: float, constant: bool = True) -> tuple[torch.Tensor, torch.Tensor, float]:  # (n a), (n b) -> M (b a), c (b), share of the variance
    "old = M new + c; fitted on five sixths, judged on the rest. `ridge` is a share of the new features' mean square."
    fit, x, y = len(new) * 5 // 6, new.double(), old.double()
    middle, mean = (x[:fit].mean(0), y[:fit].mean(0)) if constant else (0 * x[0], 0 * y[0])
    x, y = x - middle, y - mean
    gram = x[:fit].T @ x[:fit]
    weight = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).double(), x[:fit].T @ y[:fit])
    left = (x[fit:] @ weight - y[fit:]).square().sum() / (y[fit:] - y[fit:].mean(0)).square().sum()
    return weight.T.float(), (mean - middle @ weight).float(), 1 - left.item()


@torch.no_grad()
def hear_anew(tokens: ExpressionTokens, new: ExpressionEncoder, old: ExpressionEncoder, count: int = 6000, ridge: float = 1e-3) -> dict[str, float]:
    "Changes `tokens`; returns the share of each old group's variance that the new features tell."
    people, moments, shares = Identity.sample(count, seed=77_001), Expression.sample(count, seed=77_002), {}
    said, meant = (features_of(encoder, people, moments) for encoder in (new, old))
    for name in GROUPS:
        x, y = getattr(said, name), getattr(meant, name)
        matrix, _, shares[name] = fit_map(x, y, ridge, constant=False)  # a linear token has no bias that could take c
        for layers in (tokens.linear, tokens.origin):
            if layers is not None:
                layers[name].weight.copy_(layers[name].weight @ matrix)
        if name in tokens.resamplers:
            matrix, constant, shares[name] = fit_map(x, y, ridge)
            first = tokens.resamplers[name].proj_in
            first.bias.add_(first.weight @ constant)
            first.weight.copy_(first.weight @ matrix)
    return shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("weights", "folder of an animator, with dit/, tokens/ and the encoder/ it was taught with"), ("new", "folder of the encoder to use from now on"), ("out", "folder to write")):
        parser.add_argument(name, type=Path, help=what)
    parser.add_argument("--old", type=Path, help="the encoder it was taught with (default: encoder/ in WEIGHTS)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    animator = Animator.from_pretrained(args.weights)
    shares = hear_anew(animator.tokens, ExpressionEncoder.from_pretrained(args.new), ExpressionEncoder.from_pretrained(args.old or args.weights / "encoder"))
    print({name: round(share, 3) for name, share in shares.items()})
    animator.save_pretrained(args.out)
