"Chapter 06: the DiT against the released names, the reference numbers, diffusers, and itself."
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fantasy_nb.dit import DiT, DiTConfig, apply_rope, rope_3d

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs shared/reference beside the checkout")


def by_rule(name, shape):
    "The reference's weight of this name (shared/reference/README.md)."
    x = np.random.RandomState(zlib.crc32(name.encode()) % 2**32).standard_normal(shape)
    if name.endswith(("running_mean", "bias")):
        x = 0.02 * x
    elif len(shape) <= 1:
        x = 1 + 0.1 * x
    else:
        x = x / np.sqrt(np.prod(shape[1:]))
    return torch.tensor(x, dtype=torch.float32)


def by_name(name, *shape):
    "The reference's input of this name."
    return torch.tensor(np.random.RandomState(zlib.crc32(name.encode()) % 2**32).standard_normal(shape), dtype=torch.float32)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def small(**changes):
    return DiTConfig(**(dict(width=64, ffn=96, heads=2, layers=2, text_width=24, image_width=40) | changes))


def randomised(dit, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in dit.parameters():
        p.data = p.data + 0.1 * torch.randn(p.shape, generator=generator)
    return dit.eval()


def inputs(config, batch=2, t=3, h=6, w=4, text=7):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    x = draw(batch, config.in_channels, t, h, w)
    return x, torch.rand(batch, generator=generator) * 1000, draw(batch, text, 24), draw(batch, 257, 40)


@needs_reference
def test_wan_14b_is_the_released_one():
    official = json.loads((REFERENCE / "official_keys.json").read_text())
    with torch.device("meta"):
        dit = DiT(DiTConfig.wan_14b())
    want = {}
    for name, shape in official["dit_14b_i2v"].items():
        for block in range(40) if "{0..39}" in name else [0]:
            want[name.replace("{0..39}", str(block))] = tuple(shape)
    assert {name: tuple(p.shape) for name, p in dit.release_state_dict().items()} == want
    assert sum(p.numel() for p in dit.parameters()) == 16_394_878_784


@needs_reference
@torch.no_grad()
def test_golden_without_expression():
    dit = DiT(DiTConfig(width=128, ffn=256, heads=4, layers=3, text_width=64))
    dit.load_release_state_dict({name: by_rule(name, p.shape) for name, p in dit.release_state_dict().items()})
    x = torch.cat([by_name("latents", 1, 16, 3, 8, 12), by_name("image_latents", 1, 20, 3, 8, 12)], 1)
    y = dit(x, torch.tensor([437.0]), by_name("text", 1, 11, 64), by_name("clip", 1, 257, 1280))
    assert relative(y, load_file(REFERENCE / "golden.safetensors")["dit.no_expression"]) < 1e-5


def key_map():
    "Released name -> diffusers name, with N for the block."
    rows = [line.split("|") for line in (REFERENCE / "key_map.md").read_text().splitlines() if line.startswith("| `")]
    return {row[1].strip(" `"): row[2].strip(" `") for row in rows}


def diffusers_twin(dit):
    diffusers = pytest.importorskip("diffusers")
    c = dit.config
    twin = diffusers.WanTransformer3DModel(
        c.patch, c.heads, c.width // c.heads, c.in_channels, c.out_channels, c.text_width, c.frequencies, c.ffn, c.layers,
        eps=c.eps, image_dim=c.image_width, added_kv_proj_dim=c.width if c.image_width else None)
    state = {}
    for name, p in dit.release_state_dict().items():
        block = name.split(".")[1] if name.startswith("blocks.") else None
        general = name.replace(f"blocks.{block}.", "blocks.N.") if block else name
        state[key_map()[general].replace("blocks.N.", f"blocks.{block}.")] = p
    twin.load_state_dict(state)
    return twin.to(next(dit.parameters()).dtype).eval()


SHAPES = [(1, 1, 2, 2), (2, 3, 6, 4), (1, 2, 10, 14), (1, 5, 4, 2), (2, 1, 6, 10)]


@needs_reference
@torch.no_grad()
@pytest.mark.parametrize("image_width", [None, 40], ids=["t2v", "i2v"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"])
def test_equals_diffusers(image_width, dtype, tolerance):
    config = small(image_width=image_width, in_channels=36 if image_width else 16)
    dit = randomised(DiT(config)).to(dtype)
    twin = diffusers_twin(dit)
    for shape in SHAPES:
        x, t, text, image = (z.to(dtype) for z in inputs(config, *shape))
        padded = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
        image = image if image_width else None
        want = twin(x, t.float(), padded, image, return_dict=False)[0]
        assert relative(dit(x, t.float(), text, image).float(), want.float()) < tolerance, shape


@torch.no_grad()
def test_prepared_memories_change_nothing():
    dit = randomised(DiT(small()))
    x, t, text, image = inputs(dit.config)
    memories = dit.prepare(text=text, image=image)
    assert torch.equal(dit(x, t, memories=memories), dit(x, t, text, image))
    assert not torch.equal(dit(x, t, text), dit(x, t, text, image))


@torch.no_grad()
def test_a_model_without_memories():
    dit = randomised(DiT(small(text_width=None, image_width=None)))
    x, t, *_ = inputs(dit.config)
    assert dit(x, t).shape == (2, 16, 3, 6, 4) and dit.memory_names == ()


def test_checkpointing_gives_the_same_gradients():
    dit = randomised(DiT(small()))
    args = inputs(dit.config)
    gradients = []
    for dit.gradient_checkpointing in (False, True):
        dit.zero_grad()
        dit(*args).square().mean().backward()
        gradients.append([p.grad.clone() for p in dit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert all(g.abs().sum() > 0 for g in gradients[0])


@torch.no_grad()
def test_samples_of_a_batch_do_not_mix():
    dit = randomised(DiT(small()))
    x, t, text, image = inputs(dit.config)
    together = dit(x, t, text, image)
    apart = torch.cat([dit(x[i : i + 1], t[i : i + 1], text[i : i + 1], image[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, apart)


@torch.no_grad()
def test_save_and_load(tmp_path):
    dit = randomised(DiT(small()))
    dit.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    again, args = DiT.from_pretrained(tmp_path), inputs(dit.config)
    assert again.config == dit.config and torch.equal(again(*args), dit(*args))
    assert DiT.from_pretrained(tmp_path, dtype=torch.bfloat16).head.head.weight.dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError, match="config.json"):
        DiT.from_pretrained(tmp_path / "nowhere")


@torch.no_grad()
def test_released_names_round_trip_and_refuse_strangers():
    dit, other = randomised(DiT(small())), DiT(small())
    state = dit.release_state_dict()
    other.load_release_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(dit.parameters(), other.parameters()))
    with pytest.raises(ValueError, match="stranger"):
        other.load_release_state_dict(state | {"stranger": torch.zeros(1)})
    state.pop("head.head.bias")
    with pytest.raises(RuntimeError, match="head.head.bias"):
        other.load_release_state_dict(state)


def test_rope_is_relative_and_keeps_lengths():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 1, 32, generator=generator), torch.randn(1, 1, 1, 32, generator=generator)
    rope = rope_3d((4, 5, 6), 32)
    turn = lambda z: apply_rope(z.expand(1, 120, 1, 32), rope)[0, :, 0].view(4, 5, 6, 32)
    a, b = turn(q), turn(k)
    torch.testing.assert_close(a.norm(dim=-1), q.norm().expand(4, 5, 6))
    first, second = a[0, 1, 2] @ b[1, 3, 5], a[2, 0, 0] @ b[3, 2, 3]  # the same step (1, 2, 3) from two places
    torch.testing.assert_close(first, second)
    assert not torch.isclose(first, a[0, 1, 2] @ b[1, 3, 4])


def test_rope_in_float32_is_close_to_float64():
    rope = rope_3d((21, 30, 52), 128).double()
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (21, 30, 52)), indexing="ij")
    widths = (44, 42, 42)
    angle = torch.cat([a[..., None] * 10000.0 ** (-torch.arange(0, d, 2).double() / d) for a, d in zip(axes, widths)], -1).flatten(0, 2)
    assert (rope - torch.stack([angle.cos(), angle.sin()], -1)).abs().max() < 1e-5


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(2, 35, 3, 6, 4)), r"want latents \(b 36 t h w\), got \(2, 35"),
    (dict(x=torch.zeros(2, 36, 3, 5, 4)), "multiples of the patch"),
    (dict(t=torch.zeros(1)), "one time for each sample"),
    (dict(text=torch.zeros(2, 513, 24)), "at most 512 text tokens, got 513"),
    (dict(expression=torch.zeros(2, 3, 24, 8)), "no expression memory"),
])
def test_errors_say_what_was_wanted(change, message):
    dit = DiT(small())
    x, t, text, image = inputs(dit.config)
    with pytest.raises(ValueError, match=message):
        dit(**(dict(x=x, t=t, text=text, image=image) | change))


def test_a_width_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="splits into heads"):
        DiTConfig(width=100, heads=3)


def test_the_fresh_model_predicts_zero_and_every_branch_wakes_up():
    torch.manual_seed(0)
    dit = DiT(small())
    args = inputs(dit.config)
    assert not dit(*args).any()
    optimiser = torch.optim.AdamW(dit.parameters(), 1e-3)
    for _ in range(3):
        dit.zero_grad()
        (dit(*args) - 1).square().mean().backward()
        optimiser.step()
    asleep = [name for name, p in dit.named_parameters() if not p.grad.abs().sum() > 0]
    assert not asleep
