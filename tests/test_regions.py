"Chapter 07: owners, masks, isolation, and the expression memory."
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
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


def random_boxes(frames, people, size, seed, absent=0.2):
    "Boxes of all sizes that may leave the picture, and that are missing (NaN) now and then."
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(frames, people, *shape, generator=generator)
    corner = draw(2) * torch.tensor([size[1] - 4.0, size[0] - 4.0])
    boxes = torch.cat([corner, corner + 3 + 40 * draw(2)], -1)
    return boxes.masked_fill(draw(1) < absent, torch.nan)


ROOMS = (st.integers(0, 4), st.integers(1, 5), st.integers(2, 5), st.integers(2, 5), st.integers(0, 10**6))


@settings(max_examples=40, deadline=None)
@given(*ROOMS)
def test_every_visible_face_keeps_a_token(latent, people, rows, columns, seed):
    h, w, frames = 16 * rows, 16 * columns, 4 * latent + 1
    pixels = face_regions(random_boxes(frames, people, (h, w), seed), (h, w))
    try:
        owners = pool_regions(pixels, people)
    except ValueError as error:
        assert re.match(r"face [1-5] is too small or too hidden in latent frame [0-4]: \d+ pixels .* want a larger picture$", str(error))
        return
    assert owners.shape == (latent + 1, rows * columns)
    for t in range(latent + 1):
        seen = set(pixels[max(0, 4 * t - 3) : 4 * t + 1].flatten().tolist()) - {0}
        assert set(owners[t].tolist()) - {0} == seen


def owner_by_hand(boxes, y, x):
    "The nearest face whose box touches pixel (y, x): the lowest bottom edge, of equals the later one."
    owner, best = 0, -float("inf")
    for face, (x1, y1, x2, y2) in enumerate(boxes.tolist(), 1):
        if x1 < x + 1 and x < x2 and y1 < y + 1 and y < y2 and y2 >= best:
            owner, best = face, y2
    return owner


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 2), st.integers(1, 3), st.integers(0, 10**6))
def test_pixels_belong_to_the_nearest_face_that_touches_them(people, rows, columns, seed):
    size = (8 * rows, 8 * columns)
    boxes = random_boxes(2, people, size, seed)
    want = [[[owner_by_hand(each, y, x) for x in range(size[1])] for y in range(size[0])] for each in boxes]
    assert face_regions(boxes, size).tolist() == want


@settings(max_examples=25, deadline=None)
@given(*ROOMS)
def test_pooling_equals_counting_by_hand(latent, people, rows, columns, seed):
    "Where every face wins a token, the face with most pixels of a token owns it, of equals the first; of nobody's token, nobody."
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(0, people + 1, (4 * latent + 1, rows, columns), generator=generator)
    owners = owners.repeat_interleave(16, 1).repeat_interleave(16, 2)  # each token in one colour, changing from frame to frame
    want = []
    for t in range(latent + 1):
        cells = owners[max(0, 4 * t - 3) : 4 * t + 1, ::16, ::16].flatten(1).T.tolist()
        counts = [[cell.count(k) for k in range(1, people + 1)] for cell in cells]
        row = [1 + c.index(max(c)) if any(c) else 0 for c in counts]
        if set(row) - {0} != {k for cell in cells for k in cell} - {0}:
            return  # somebody wins no token: the rule for small faces, tested above
        want.append(row)
    assert pool_regions(owners, people).tolist() == want


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_a_mask_row_names_its_owner_and_nobody_else(people, frames, tokens, each, seed):
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(0, people + 1, (frames, tokens), generator=generator)
    keep = torch.rand(frames, each, generator=generator) > 0.3
    mask = attention_mask(owners, people, each, keep).view(frames, tokens, people, each)
    for t in range(frames):
        for n in range(tokens):
            want = torch.zeros(people, each, dtype=torch.bool)
            if owners[t, n]:
                want[owners[t, n] - 1] = keep[t]
            assert torch.equal(mask[t, n], want)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(1, 70), st.integers(1, 70))
def test_sizes_that_do_not_fit_get_one_clear_error(frames, h, w):
    owners = torch.zeros(frames, h, w, dtype=torch.uint8)
    if frames % 4 != 1:
        with pytest.raises(ValueError, match=rf"^want 4n\+1 frames, got {frames}: .*pad to {frames + (1 - frames) % 4}$"):
            pool_regions(owners, 1)
    elif h % 16 or w % 16:
        with pytest.raises(ValueError, match=f"^want height and width that are multiples of 16 pixels, got {h} x {w}$"):
            pool_regions(owners, 1)
    else:
        assert pool_regions(owners, 1).shape == ((frames + 3) // 4, h * w // 256)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.integers(1, 3))
def test_more_owners_than_people_get_one_clear_error(people, surplus):
    owners = torch.zeros(1, 16, 32, dtype=torch.uint8)
    owners[..., :4] = people + surplus
    for call in (lambda: pool_regions(owners, people), lambda: attention_mask(owners.flatten(1), people, 4)):
        with pytest.raises(ValueError, match=rf"^want owners 0 \.\. {people}, got {people + surplus}$"):
            call()


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
    (lambda: add_expression(tiny_dit(), 8)(torch.zeros(1, 8, 2, 2, 2), torch.zeros(1), expression=torch.zeros(1, 2, 4, 8), expression_scale=torch.ones(3)), r"want a scale or one for each of 1 samples, got \(3,\)"),
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

def scene(people, kind, latent=3, rows=3, columns=6):
    "Owners of every latent token: faces that stand apart and still, or that move and overlap."
    frames, w, h = 4 * latent - 3, 16 * columns, 16 * rows
    t, k = torch.arange(frames)[:, None], torch.arange(people)
    if kind == "moving":
        left, top, width = 8 + torch.linspace(0, min(w - 40, 22 * people - 22), people) + 8 * torch.sin(t / 2 + k), 4 + 3.0 * k, 36
    else:
        left, top, width = (16.0 * k + 2).expand(frames, -1), torch.full((people,), 2.0), 12
    top = top.expand(frames, -1)
    boxes = torch.stack([left, top, left + width, top + 24], -1)
    return boxes, pool_regions(face_regions(boxes, (h, w)), people)


def ours(memory, query, features, owners, compat=None):
    "The branch; compat=\"release\" with the release's mask and order of people."
    key, value = memory.keys_values(people_tokens(features, compat=compat))
    mask = attention_mask(owners, len(features), 4, compat=compat)
    return memory(query, key, value, memory.guard(key, mask[None], 1.0, (1, *owners.shape)))


def the_release(memory, query, features, owners):
    return ours(memory, query, features, owners, "release")


def equation_4(memory, query, features, owners):
    "softmax(M * Q K / sqrt d) V, the mask multiplied as it is printed."
    key, value = memory.keys_values(people_tokens(features))
    mask = attention_mask(owners, len(features), 4)
    each = rearrange(query, "b (t n) k d -> (b t) n k d", t=len(owners))
    logits = torch.einsum("bnkd,bmkd->bknm", each, key) / query.shape[-1] ** 0.5 * mask[:, None]
    return rearrange(torch.einsum("bknm,bmkd->bnkd", logits.softmax(-1), value), "t n k d -> 1 (t n) k d")


def assert_isolated(branch, people, dtype, kind="moving"):
    "d branch(tokens of owner i) / d features(person j): 0 for i != j, not 0 for i = j; the background's answer is 0; all numbers are finite."
    generator = torch.Generator().manual_seed(people)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
    owners, memory = scene(people, kind)[1], ExpressionAttention(8, 32, 2).to(dtype)
    for p in memory.parameters():
        p.data = draw(*p.shape)
    features = [draw(1, 3, 4, 8).requires_grad_() for _ in range(people)]
    out = branch(memory, draw(1, owners.numel(), 2, 16), features, owners)
    assert out.dtype == dtype and out.isfinite().all()
    background = out[0, owners.flatten() == 0]
    assert background.numel() and not background.any(), "the background hears somebody"
    for i in range(people + 1):
        weight = draw(*out.shape) * (owners.flatten() == i)[None, :, None, None]
        gradients = torch.autograd.grad((out * weight).sum(), features, retain_graph=True)
        for j, gradient in enumerate(gradients, 1):
            assert gradient.isfinite().all()
            assert bool(gradient.any()) == (i == j), f"owner {i} and driver {j}: gradient up to {gradient.abs().max()}"


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
KINDS = pytest.mark.parametrize("kind", ["apart", "moving"])
PEOPLE = pytest.mark.parametrize("people", [1, 2, 3, 5])


@PEOPLE
def test_the_moving_scene_moves_and_overlaps(people):
    boxes, owners = scene(people, "moving")
    assert (owners[1:] != owners[:-1]).any() and set(owners.unique().tolist()) == set(range(people + 1))
    if people > 1:
        assert (boxes[:, 1:, 0] < boxes[:, :-1, 2]).any()
    still, apart = scene(people, "apart")
    assert (apart == apart[0]).all() and (still[:, 1:, 0] > still[:, :-1, 2]).all()


@DTYPES
@KINDS
@PEOPLE
def test_isolation_is_exact(people, kind, dtype):
    assert_isolated(ours, people, dtype, kind)


@DTYPES
@KINDS
@pytest.mark.parametrize("people", [2, 3, 5])
def test_equation_4_read_literally_fails_the_isolation_test(people, kind, dtype):
    with pytest.raises(AssertionError, match="background hears"):
        assert_isolated(equation_4, people, dtype, kind)
    with pytest.raises(AssertionError, match="owner 1 and driver 2"):
        assert_isolated(silent_background(equation_4), people, dtype, kind)


@DTYPES
@KINDS
def test_the_release_fails_the_isolation_test_with_three_people(kind, dtype):
    with pytest.raises(AssertionError, match="background hears"):
        assert_isolated(the_release, 3, dtype, kind)
    with pytest.raises(AssertionError, match="owner 1 and driver 2"):
        assert_isolated(silent_background(the_release), 3, dtype, kind)
    assert_isolated(silent_background(the_release), 2, dtype, kind)  # two: the errors cancel on the faces, only its background hears


def silent_background(branch):
    "A branch whose background is silenced by force: what is wrong on the faces stays."
    return lambda memory, query, features, owners: branch(memory, query, features, owners) * (owners.flatten() > 0)[None, :, None, None]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 3), st.integers(2, 4), st.integers(3, 6), st.integers(0, 10**6))
def test_isolation_of_any_scene(people, latent, rows, columns, seed):
    "Random owners, some frames without some faces: a driver's features change its own face's tokens and no others, to the last bit."
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(0, people + 1, (latent + 1, rows * columns), generator=generator)
    memory = ExpressionAttention(8, 32, 2)
    for p in memory.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    query = torch.randn(1, owners.numel(), 2, 16, generator=generator)
    features = [torch.randn(1, latent + 1, 4, 8, generator=generator) for _ in range(people)]
    moved = int(torch.randint(people, (1,), generator=generator))
    others = [z + 1.0 * (k == moved) for k, z in enumerate(features)]
    with torch.no_grad():
        one, two = (ours(memory, query, z, owners)[0] for z in (features, others))
    changed = (one != two).flatten(1).any(1)
    assert torch.equal(changed, owners.flatten() == moved + 1)
    assert not one[owners.flatten() == 0].any() and one.isfinite().all()


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


# what must not pass in silence

def test_a_driver_that_is_not_a_number_is_refused_by_name():
    good, bad = torch.zeros(1, 2, 3, 4), torch.full((1, 2, 3, 4), torch.nan)
    with pytest.raises(ValueError, match="finite tokens.*person 2"):
        people_tokens([good, bad, good])


@pytest.mark.parametrize("call", [
    lambda c: face_regions(boxes_of([0, 0, 8, 8]), (16, 16), compat=c),
    lambda c: pool_regions(torch.zeros(1, 16, 16, dtype=torch.uint8), 1, compat=c),
    lambda c: people_tokens([torch.zeros(1, 1, 2, 4)], compat=c),
    lambda c: attention_mask(torch.tensor([[0, 1, 2]]), 2, 3, compat=c),
])  # fmt: skip
def test_a_misspelt_compat_is_refused(call):
    call("release"), call(None)
    with pytest.raises(ValueError, match='want compat=None or "release", got \'relase\''):
        call("relase")


def test_the_release_has_no_mask_for_one_person():
    with pytest.raises(ValueError, match="no mask for one person"):
        attention_mask(torch.tensor([[0, 1]]), 1, 3, compat="release")


def test_follow_boxes_starts_where_the_driver_first_appears():
    driver = torch.tensor([[torch.nan] * 4, [10.0, 10, 30, 30], [14, 10, 34, 30]])
    boxes = follow_boxes(torch.tensor([100.0, 100, 140, 140]), driver)
    assert boxes[0].isnan().all() and boxes[1].tolist() == [100, 100, 140, 140] and boxes[2].tolist() == [108, 100, 148, 140]
    with pytest.raises(ValueError, match="at least one frame, got none"):
        follow_boxes(torch.tensor([0.0, 0, 9, 9]), torch.full((3, 4), torch.nan))


def test_isolation_holds_from_the_554_features_on():
    "Through tokens and windows as well: the gradient at face i with respect to driver j's features is exactly zero."
    from fantasy_nb.tokens import ExpressionTokens, TokenConfig, window_tokens

    torch.manual_seed(0)
    tokens, memory = ExpressionTokens(TokenConfig.tiny()).eval(), ExpressionAttention(64, 32, 2)
    _ = [torch.nn.init.normal_(p) for p in memory.parameters()]
    features = [torch.randn(1, 5, 554, requires_grad=True) for _ in range(3)]
    windows = [window_tokens(tokens(f)) for f in features]
    owners = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    mask = attention_mask(owners, 3, windows[0][0].shape[2], keep=windows[0][1])
    key, value = memory.keys_values(people_tokens([w for w, _ in windows]))
    answer = memory(torch.randn(1, 8, 2, 16), key, value, memory.guard(key, mask[None], 1.0, (1, 2, 4)))
    for owner in range(4):
        slopes = torch.autograd.grad(answer[0, owners.flatten() == owner].square().sum(), features, retain_graph=True)
        assert [bool(g.any()) for g in slopes] == [owner == k for k in (1, 2, 3)]
