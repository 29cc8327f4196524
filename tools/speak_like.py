"""A new encoder for an animator that knows an old one: `python tools/speak_like.py NEW OLD OUT`

An animator understands the features it was taught with and no others. This refits the last layer of each group of NEW, by ridge regression on drawn people, so that
its features are those of OLD as nearly as they can be told; the group's own network stays. Then `fantasy-train --init WEIGHTS --encoder OUT` begins near where WEIGHTS were
(LOG.md, 28 November 2026, has how near) and not with a deaf animator. Prints how much of OLD's variance is explained on faces that were not used."""

import argparse

import torch

from fantasy_nb.expression import GROUPS, ExpressionEncoder, Features, as_bytes, as_crops, hidden_of_pictures, last_layer
from fantasy_nb.faces import Expression, Identity, render_crops


def faces_for(config, people, moments):  # -> (n 3 s s) uint8
    "The same faces, cut out as one encoder wants them."
    parts = torch.arange(len(moments)).split(200)
    return torch.cat([as_bytes(render_crops(people[part], moments[part], config.image_size, closer=config.closer)) for part in parts])


@torch.no_grad()
def speak_like(new: ExpressionEncoder, old: ExpressionEncoder, count: int = 6000, ridge: float = 10.0) -> dict[str, float]:
    "Changes `new`; returns the share of each group's variance in `old` that it now says, on the last sixth of the faces."
    people, moments = Identity.sample(count, seed=77_001), Expression.sample(count, seed=77_002)
    wanted = Features.unpack(torch.cat([old(as_crops(part)).pack() for part in faces_for(old.config, people, moments).split(100)]))
    hidden, fit, shares = hidden_of_pictures(new, faces_for(new.config, people, moments)), count * 5 // 6, {}
    for name in GROUPS:
        x, y = hidden[name].double(), getattr(wanted, name).double()
        middle, mean = x[:fit].mean(0), y[:fit].mean(0)
        x, y = x - middle, y - mean
        weight = torch.linalg.solve(x[:fit].T @ x[:fit] + ridge * torch.eye(x.shape[1]).double(), x[:fit].T @ y[:fit])
        layer = last_layer(new, name)
        layer.weight.copy_(weight.T), layer.bias.copy_(mean - middle @ weight)
        shares[name] = 1 - ((x[fit:] @ weight - y[fit:]).square().sum() / y[fit:].square().sum()).item()
    return shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("new", "folder of the encoder to use from now on"), ("old", "folder of the encoder the animator was taught with"), ("out", "folder to write")):
        parser.add_argument(name, help=what)
    args = parser.parse_args()
    new, old = ExpressionEncoder.from_pretrained(args.new), ExpressionEncoder.from_pretrained(args.old)
    print({name: round(share, 3) for name, share in speak_like(new, old).items()})
    new.save_pretrained(args.out)
