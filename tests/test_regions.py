"Chapter 07: owners, masks, isolation, and the expression memory."
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fantasy_nb.dit import DiT, DiTConfig
from fantasy_nb.regions import (
    ExpressionAttention,
    Guard,
    add_expression,
    attention_mask,
    face_regions,
    follow_boxes,
    people_tokens,
    pool_regions,
)

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs shared/reference beside the checkout")


def boxes_of(*rows, frames=5):
    return torch.tensor(rows, dtype=torch.float32).expand(frames, -1, -1)


def tiny_dit(seed=0, **changes):
    torch.manual_seed(seed)
    return DiT(DiTConfig(**(dict(in_channels=8, out_channels=4, width=32, ffn=48, heads=2, layers=2, text_width=None, image_width=None) | changes)))


def randomised(dit, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in dit.parameters():
        p.data = p.data + 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)
    return dit.eval()


# owners

def test_the_nearer_face_owns_the_overlap():
    near_first = face_regions(boxes_of([0, 0, 40, 60], [20, 0, 60, 50]), (64, 64))
    near_last = face_regions(boxes_of([20, 0, 60, 50], [0, 0, 40, 60]), (64, 64))
    assert near_first[0, 10, 30] == 1 and near_last[0, 10, 30] == 2
    assert near_first[0, 10, 50] == 2 and near_first[0, 63, 63] == 0 and near_first[0, 59, 30] == 1


def test_boxes_move_and_faces_leave():
    boxes = torch.full((9, 1, 4), torch.nan)
    boxes[:4, 0] = torch.tensor([0.0, 0, 16, 16])
    boxes[4:6, 0] = torch.tensor([32.0, 0, 48, 16])
    owners = pool_regions(face_regions(boxes, (16, 48)), people=1)
    assert owners.tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 1]]  # frame 0; frames 1-4; frames 5-8 (it leaves after 5)


def test_latent_frames_cover_frames_4i_minus_3_to_4i():
    for frame in range(13):
        owners = torch.zeros(13, 16, 16, dtype=torch.uint8)
        owners[frame, 3, 3] = 1
        assert pool_regions(owners)[:, 0].nonzero().tolist() == [[(frame + 3) // 4]]


def test_the_face_with_most_pixels_takes_the_token():
    owners = torch.zeros(1, 16, 32, dtype=torch.uint8)
    owners[0, :, :10], owners[0, :, 10:20] = 1, 2
    assert pool_regions(owners).tolist() == [[1, 2]]
    assert pool_regions(owners, compat="release").tolist() == [[2, 2]]


def test_a_small_face_keeps_a_token_or_an_error_names_it():
    owners = torch.ones(1, 32, 32, dtype=torch.uint8)
    owners[0, 20:22, 20:22] = 2
    assert pool_regions(owners).tolist() == [[1, 1, 1, 2]]
    crowded = torch.ones(1, 16, 16, dtype=torch.uint8)
    crowded[0, 0, 0] = 2
    with pytest.raises(ValueError, match="face 2 is too small .* latent frame 0: 1 pixels"):
        pool_regions(crowded)


def test_follow_boxes_moves_in_units_of_the_face():
    driver = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [0, 0, 20, 20]])
    moved = follow_boxes(torch.tensor([100.0, 100, 140, 140]), driver)
    assert moved.tolist() == [[100, 100, 140, 140], [120, 100, 160, 140], [100, 100, 180, 180]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 4), st.integers(1, 5), st.integers(2, 5), st.integers(2, 5), st.integers(0, 10**6))
def test_every_visible_face_keeps_a_token(latent, people, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    h, w, frames = 16 * rows, 16 * columns, 4 * latent + 1
    corner = torch.rand(frames, people, 2, generator=generator) * torch.tensor([w - 4.0, h - 4.0])
    boxes = torch.cat([corner, corner + 3 + 40 * torch.rand(frames, people, 2, generator=generator)], -1)
    pixels = face_regions(boxes, (h, w))
    try:
        owners = pool_regions(pixels, people)
    except ValueError as error:
        assert "too small" in str(error)
        return
    assert owners.shape == (latent + 1, rows * columns)
    for t in range(latent + 1):
        seen = set(pixels[max(0, 4 * t - 3) : 4 * t + 1].flatten().tolist()) - {0}
        assert set(owners[t].tolist()) - {0} == seen


@pytest.mark.parametrize("call, message", [
    (lambda: pool_regions(torch.zeros(4, 16, 16)), "want 4n\\+1 frames, got 4: trim to 1 or pad to 5"),
    (lambda: pool_regions(torch.zeros(5, 17, 16)), "multiples of 16 pixels, got 17 x 16"),
    (lambda: pool_regions(torch.full((5, 16, 16), 3), people=2), "want owners 0 .. 2, got 3"),
    (lambda: face_regions(torch.zeros(5, 4), (16, 16)), "want boxes"),
    (lambda: face_regions(boxes_of([8, 0, 4, 4]), (16, 16)), "x1 < x2"),
    (lambda: attention_mask(torch.full((1, 4), 3), 2, 4), "want owners 0 .. 2, got 3"),
    (lambda: people_tokens([torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 3, 4)]), "tokens of one shape"),
    (lambda: add_expression(add_expression(tiny_dit(), 8), 8), "already"),
    (lambda: add_expression(tiny_dit(), 8)(torch.zeros(1, 8, 2, 2, 2), torch.zeros(1), expression=torch.zeros(1, 3, 4, 8)), "want expression tokens .* 1 x 2 latent frames, got 3"),
    (lambda: add_expression(tiny_dit(), 8)(torch.zeros(1, 8, 2, 2, 2), torch.zeros(1), expression=torch.zeros(1, 2, 4, 8), expression_mask=torch.ones(1, 2, 9, 4).bool()), "want a mask"),
])
def test_errors_say_what_was_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# masks

def test_two_people_four_tokens_by_eye():
    mask = attention_mask(torch.tensor([[0, 1, 2, 1]]), 2, 2)
    assert mask.int().tolist() == [[[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]]]
    keep = torch.tensor([[True, False]])
    assert attention_mask(torch.tensor([[0, 1, 2, 1]]), 2, 2, keep).int().tolist() == [[[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]]


def test_the_release_is_right_for_two_faces_and_wrong_for_three():
    def seen(people):  # face -> characters it attends, through the release's order of tokens
        mask = attention_mask(torch.arange(1, people + 1)[None], people, 1, compat="release")[0]
        characters = people_tokens([torch.full((1, 1, 1, 1), i + 1.0) for i in range(people)], compat="release").flatten()
        return [sorted(characters[row].int().tolist()) for row in mask]
    assert seen(2) == [[1], [2]]
    assert seen(3) == [[1, 2], [1, 3], [2, 3]]


def by_name(name, *shape):
    return torch.tensor(np.random.RandomState(zlib.crc32(name.encode()) % 2**32).standard_normal(shape), dtype=torch.float32)


def by_rule(name, shape):
    x = np.random.RandomState(zlib.crc32(name.encode()) % 2**32).standard_normal(shape)
    scale = 0.02 * x if name.endswith("bias") else 1 + 0.1 * x if len(shape) <= 1 else x / np.sqrt(np.prod(shape[1:]))
    return torch.tensor(scale, dtype=torch.float32)


def load_by_rule(module):
    module.load_release_state_dict({name: by_rule(name, p.shape) for name, p in module.release_state_dict().items()})
    return module.eval()


@needs_reference
@torch.no_grad()
def test_golden_owner_mask_and_outputs():
    from fantasy_nb.tokens import ExpressionTokens, TokenConfig, window_tokens

    golden = load_file(REFERENCE / "golden.safetensors")
    boxes = golden["boxes"].expand(9, 2, 4)
    owners = pool_regions(face_regions(boxes, (64, 96), compat="release"), compat="release")
    assert torch.equal(owners, golden["owner"])
    assert torch.equal(pool_regions(face_regions(boxes, (64, 96))), golden["owner"])  # ours agrees where faces stay apart
    mask = attention_mask(owners, 2, 97, compat="release")
    assert torch.equal(mask, golden["release.mask"].bool())

    with torch.device("meta"):  # 164 M parameters: no time for an initialisation that is overwritten
        tokens = ExpressionTokens(TokenConfig.release())
    tokens = load_by_rule(tokens.to_empty(device="cpu"))
    people = [window_tokens(tokens(by_name(f"features{i}", 1, 9, 554)), compat="release")[0] for i in range(2)]
    dit = load_by_rule(add_expression(DiT(DiTConfig(width=128, ffn=256, heads=4, layers=3, text_width=64)), 2048))
    x = torch.cat([by_name("latents", 1, 16, 3, 8, 12), by_name("image_latents", 1, 20, 3, 8, 12)], 1)
    args = (x, torch.tensor([437.0]), by_name("text", 1, 11, 64), by_name("clip", 1, 257, 1280))
    one = dit(*args, expression=people[0])
    two = dit(*args, expression=people_tokens(people, compat="release"), expression_mask=mask[None])
    for y, name in ((one, "dit.one_person"), (two, "dit.people_release_mask")):
        assert (y - golden[name]).norm() / golden[name].norm() < 1e-5, name


@needs_reference
def test_expression_memory_of_wan_14b_has_the_released_names():
    import json
    official = json.loads((REFERENCE / "official_keys.json").read_text())
    with torch.device("meta"):
        dit = DiT(DiTConfig.wan_14b())
        before = set(dit.release_state_dict())
        add_expression(dit, 2048)
    added = {name: tuple(p.shape) for name, p in dit.release_state_dict().items() if name not in before}
    want = {name.replace("{0..39}", str(i)): tuple(shape) for name, shape in official["dit_ip_adapter"].items() for i in range(40)}
    assert added == want and sum(np.prod(s) for s in added.values()) == 838_860_800


# the branch

def overlapping(people, latent=3, rows=3, columns=6):
    "Moving, overlapping faces: owners of every latent token."
    frames, w, h = 4 * latent - 3, 16 * columns, 16 * rows
    t = torch.arange(frames)[:, None]
    left = torch.linspace(0, w - 40, people)[None] + 8 * torch.sin(t / 3 + torch.arange(people))
    top = 4 + 3.0 * torch.arange(people).expand(frames, -1)
    boxes = torch.stack([left, top, left + 36, top + 24], -1)
    return pool_regions(face_regions(boxes, (h, w)), people)


def branch_gradients(people, dtype, mask_of):
    "|d branch at tokens of owner i / d features of person j|, summed: (people+1, people); and the branch itself."
    torch.manual_seed(people)
    owners = overlapping(people)
    memory = ExpressionAttention(8, 32, 2).to(dtype)
    for p in memory.parameters():
        torch.nn.init.normal_(p)
    features = [torch.randn(1, 3, 4, 8, dtype=dtype, requires_grad=True) for _ in range(people)]
    query = torch.randn(1, owners.numel(), 2, 16, dtype=dtype)
    order, mask = mask_of(owners, people)
    key, value = memory.keys_values(people_tokens(features, compat=order))
    out = memory(query, key, value, memory.guard(key, mask[None], 1.0, (1, *owners.shape)))
    rows = []
    for i in range(people + 1):
        weight = torch.randn_like(out) * (owners.flatten() == i)[None, :, None, None]
        grads = torch.autograd.grad((out * weight).sum(), features, retain_graph=True)
        rows.append(torch.stack([g.abs().sum() for g in grads]))
    return torch.stack(rows), out[0, owners.flatten() == 0]


right = lambda owners, people: (None, attention_mask(owners, people, 4))
release = lambda owners, people: ("release", attention_mask(owners, people, 4, compat="release"))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
@pytest.mark.parametrize("people", [1, 2, 3, 5])
def test_isolation_is_exact(people, dtype):
    gradient, background = branch_gradients(people, dtype, right)
    own = torch.eye(people, dtype=torch.bool)
    assert gradient.isfinite().all() and background.numel() and not background.any()
    assert not gradient[0].any() and not gradient[1:][~own].any()
    assert (gradient[1:][own] > 0).all()


def test_the_isolation_test_can_fail():
    own = torch.eye(3, dtype=torch.bool)
    gradient, background = branch_gradients(3, torch.float32, release)
    assert gradient[1:][~own].any() and background.any()
    assert not branch_gradients(2, torch.float32, release)[0][1:][~torch.eye(2, dtype=torch.bool)].any()


@torch.no_grad()
def test_a_fresh_expression_memory_changes_nothing():
    for changes in ({}, dict(text_width=6, image_width=10)):
        plain, more = (randomised(tiny_dit(**changes)) for _ in range(2))
        add_expression(more, 8)
        x, t = torch.randn(2, 8, 3, 4, 6), torch.tensor([10.0, 700.0])
        given = dict(text=torch.randn(2, 5, 6), image=torch.randn(2, 257, 10)) if changes else {}
        want = plain(x, t, **given)
        mask = attention_mask(torch.randint(0, 3, (3, 6)), 2, 4)[None]
        expression = torch.randn(2, 3, 8, 8)
        assert torch.equal(more(x, t, **given), want)
        assert torch.equal(more(x, t, expression=expression, **given), want)
        assert torch.equal(more(x, t, expression=expression, expression_mask=mask, **given), want)


@torch.no_grad()
def test_scale_prepare_and_batched_guidance():
    dit = randomised(add_expression(tiny_dit(), 8))
    x, t = torch.randn(1, 8, 3, 4, 6), torch.tensor([300.0])
    expression, mask = torch.randn(1, 3, 8, 8), attention_mask(torch.randint(0, 3, (3, 6)), 2, 4)[None]
    on, off = dit(x, t, expression=expression, expression_mask=mask), dit(x, t)
    assert not torch.allclose(on, off)
    assert torch.equal(dit(x, t, expression=expression, expression_mask=mask, expression_scale=0), off)
    memories = dit.prepare(expression=expression)
    assert torch.equal(dit(x, t, memories=memories, expression_mask=mask), on)
    pair = dit(x.repeat(2, 1, 1, 1, 1), t.repeat(2), expression=expression.repeat(2, 1, 1, 1), expression_mask=mask, expression_scale=torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(pair, torch.cat([off, on]))


@torch.no_grad()
def test_a_driver_moves_its_own_latent_frame_only():
    memory = ExpressionAttention(8, 32, 2)
    for p in memory.parameters():
        torch.nn.init.normal_(p)
    query, tokens = torch.randn(1, 18, 2, 16), torch.randn(1, 3, 4, 8)
    answer = lambda z: memory(query, *memory.keys_values(z), Guard(None, 1.0))
    other = tokens.clone()
    other[:, 1] += 1
    change = (answer(other) - answer(tokens)).abs().sum((0, 2, 3)).view(3, 6)
    assert not change[[0, 2]].any() and (change[1] > 0).all()


@torch.no_grad()
def test_save_and_load_with_expression(tmp_path):
    dit = randomised(add_expression(tiny_dit(), 8))
    dit.save_pretrained(tmp_path)
    x, t, expression = torch.randn(1, 8, 3, 4, 6), torch.tensor([300.0]), torch.randn(1, 3, 4, 8)
    again = DiT.from_pretrained(tmp_path, add_expression)
    assert torch.equal(again(x, t, expression=expression), dit(x, t, expression=expression))
    with pytest.raises(ValueError, match="has an expression memory"):
        DiT.from_pretrained(tmp_path)


def test_the_zero_memory_learns():
    dit = add_expression(tiny_dit(), 8)
    torch.nn.init.normal_(dit.head.head.weight)
    x, t = torch.randn(1, 8, 3, 4, 6), torch.tensor([300.0])
    loss = lambda: dit(x, t, expression=torch.ones(1, 3, 4, 8)).square().sum()
    loss().backward()
    memory = dit.blocks[0].cross_attention.memories["expression"]
    assert memory.value.weight.grad.abs().sum() > 0 and not memory.key.weight.grad.any()  # the paper's start: values first
