"Chapter 04: expression tokens, their windows, and agreement with the release."
import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fantasy_nb.expression import Features
from fantasy_nb.tokens import ExpressionTokens, TokenConfig, frame_place, strengthen, window_index, window_tokens

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "reference").exists(), reason="no ../shared beside the checkout")


def raw(name, shape):
    "reference/README.md's inputs: normal numbers seeded by the name."
    return torch.tensor(np.random.RandomState(zlib.crc32(name.encode()) % 2**32).standard_normal(shape), dtype=torch.float32)


def by_rule(name, shape):
    "reference/README.md's weights: the same numbers, scaled by what the name ends with."
    x = np.random.RandomState(zlib.crc32(name.encode()) % 2**32).standard_normal(shape)
    if name.endswith("running_var"):
        x = 1 + 0.1 * abs(x)
    elif name.endswith(("running_mean", "bias")):
        x = 0.02 * x
    elif len(shape) <= 1:
        x = 1 + 0.1 * x
    else:
        x = x / np.sqrt(np.prod(shape[1:]))
    return torch.tensor(x, dtype=torch.float32)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return ExpressionTokens(TokenConfig.tiny())


@needs_shared
def test_release_names_and_shapes():
    keys = json.loads((SHARED / "reference/official_keys.json").read_text())["portrait_adapter"]
    with torch.device("meta"):
        state = ExpressionTokens(TokenConfig.release()).release_state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == keys


@needs_shared
def test_release_golden():
    keys = json.loads((SHARED / "reference/official_keys.json").read_text())["portrait_adapter"]
    golden = load_file(SHARED / "reference/golden.safetensors")["tokens.person0"]
    with torch.device("meta"):
        model = ExpressionTokens(TokenConfig.release())
    model.to_empty(device="cpu").load_release_state_dict({name: by_rule(name, shape) for name, shape in keys.items()})
    with torch.no_grad():
        tokens = model.eval()(raw("features0", (1, 9, 554)))[..., ::16]
    assert (tokens - golden).norm() / golden.norm() < 1e-5
    assert (tokens - golden).abs().max() / golden.abs().max() < 1e-5


def test_load_release_names_what_is_missing(tiny):
    state = {k: v for k, v in tiny.release_state_dict().items() if k != "proj_model.eye_proj.weight"}
    with pytest.raises(RuntimeError, match="linear.eyes.weight"):
        tiny.load_release_state_dict(state)
    with pytest.raises(RuntimeError, match="surplus"):
        tiny.load_release_state_dict(tiny.release_state_dict() | {"surplus": torch.zeros(1)})


def test_tiny_shape_size_and_gradients(tiny):
    assert sum(p.numel() for p in tiny.parameters()) <= 0.8e6
    x = torch.randn(2, 9, 554, requires_grad=True)
    tokens = tiny(x, origin=torch.randn(2, 554))
    assert tokens.shape == (2, 9, 24, TokenConfig.tiny().width)
    tokens.square().sum().backward()
    assert (x.grad.abs().sum((0, 1)) > 0).all() and all(p.grad is not None for p in tiny.parameters())


def test_frames_do_not_mix_before_the_windows(tiny):
    x = torch.randn(1, 5, 554)
    changed = x.clone()
    changed[:, 3] += 1
    difference = (tiny(x) - tiny(changed)).abs().amax((0, 2, 3))
    assert difference[3] > 1e-3 and difference[[0, 1, 2, 4]].max() == 0


@pytest.mark.parametrize("learnable, count", [((), 4), (("mouth",), 20), (("mouth", "emotion"), 24), (("mouth", "emotion", "head", "eyes"), 32)])
def test_variants(learnable, count):
    from dataclasses import replace

    config = replace(TokenConfig.tiny(), learnable=learnable)
    assert ExpressionTokens(config)(torch.randn(1, 5, 554)).shape == (1, 5, count, config.width) and config.tokens_per_frame == count


def test_group_order(tiny):
    "Places 0-3 are head, eyes, emotion, mouth; 4-19 mouth, 20-23 emotion."
    tiny = tiny.eval()
    where = {"head": [0], "eyes": [1], "emotion": [2, *range(20, 24)], "mouth": [3, *range(4, 20)]}
    x = Features.unpack(torch.randn(1, 1, 554))
    for name, places in where.items():
        other = Features(**{g: getattr(x, g) + (torch.randn_like(getattr(x, g)) if g == name else 0) for g in where})
        moved = (tiny(x) - tiny(other)).abs().amax((0, 1, 3)) > 1e-6
        assert moved.nonzero().flatten().tolist() == sorted(places)


def test_frame_position_tells_places_apart(tiny):
    assert frame_place(9).tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4]
    still = tiny(torch.randn(1, 1, 554).expand(1, 9, -1))
    assert torch.equal(still[:, 1], still[:, 5]) and not torch.allclose(still[:, 1], still[:, 2])


def test_window_index_against_obvious_loops():
    "The specification, written as loops over latent frames."
    for n in (0, 1, 3, 5):
        index, want = window_index(4 * n + 1, 24), []
        for i in range(n + 1):
            frames = [0] if i == 0 else range(4 * i - 3, 4 * i + 1)
            row = [f * 24 + slot for f in frames for slot in range(24)]
            want.append(row + [-1] * (96 - len(row)))
        assert index.tolist() == want


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(1, 32), st.integers(1, 3))
def test_windows_of_any_length(n, each, batch):
    "Every token is in exactly one window, that of its latent frame, in its order; window 0 is one frame and padding."
    frames = 4 * n + 1
    tokens = torch.arange(batch * frames * each).view(batch, frames, each, 1) + 1
    windows, keep = window_tokens(tokens)
    assert windows.shape == (batch, n + 1, 4 * each, 1) and keep.sum(1).tolist() == [each] + [4 * each] * n
    assert torch.equal(windows[:, keep], tokens.flatten(1, 2)) and not windows[:, ~keep].any()
    frame = torch.where(keep, window_index(frames, each) // each, 0)
    assert torch.equal((frame + 3) // 4, torch.arange(n + 1)[:, None].expand_as(frame) * keep)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 32))
def test_release_windows_are_ours_and_one_stray_token(n, each):
    ours, release = window_index(4 * n + 1, each), window_index(4 * n + 1, each, compat="release")
    assert torch.equal(release[1:, 1:], ours[1:]) and torch.equal(release[1:, 0], ours[1:, 0] - 1)
    assert torch.equal(release[0, :-1], ours[0]) and release[0, -1] == -1


@settings(max_examples=40, deadline=None)
@given(st.integers(-3, 100).filter(lambda frames: frames < 1 or frames % 4 != 1))
def test_a_wrong_frame_count_gets_one_clear_error(frames):
    low = (frames - 1) // 4 * 4 + 1
    advice = f"trim to {low} or pad to {low + 4}" if frames > 1 else "pad to 1"
    with pytest.raises(ValueError, match=rf"^want 4n\+1 frames, got {frames}: {advice}$"):
        window_index(frames)
    if frames >= 0:
        with pytest.raises(ValueError, match=rf"^want 4n\+1 frames, got {frames}: {advice}$"):
            window_tokens(torch.zeros(1, frames, 2, 3))


def test_windows_hold_each_token_once():
    tokens = torch.arange(13 * 24.0).view(1, 13, 24, 1) + 1
    windows, keep = window_tokens(tokens)
    assert windows.shape == (1, 4, 96, 1) and keep.sum(1).tolist() == [24, 96, 96, 96]
    assert torch.equal(windows[0, ..., 0][keep], tokens.flatten()) and (windows[0, ..., 0][~keep] == 0).all()


def test_release_windows():
    index = window_index(9, compat="release")
    assert index.shape == (3, 97) and index[1, 0] == 23 and index[2, 0] == 119
    windows, keep = window_tokens(torch.randn(1, 9, 24, 2), compat="release")
    assert windows.shape == (1, 3, 97, 2) and keep.all() and (windows[:, 0, 24:] == 0).all()


@needs_shared
def test_release_windows_golden():
    golden = load_file(SHARED / "reference/golden.safetensors")["windows.release"]
    assert torch.equal(window_index(9, compat="release"), golden.long())
    tokens = torch.arange(9 * 24.0).view(1, 9, 24, 1)
    windows, _ = window_tokens(tokens, compat="release")
    assert torch.equal(windows[0, ..., 0].long(), golden.long().where(golden >= 0, 0))


def test_errors_say_what_was_wanted():
    with pytest.raises(ValueError, match=r"want 4n\+1 frames, got 12: trim to 9 or pad to 13"):
        window_tokens(torch.zeros(1, 12, 24, 2))
    with pytest.raises(ValueError, match="got 0"):
        window_index(0)
    with pytest.raises(ValueError, match="compat"):
        window_index(9, compat="wan")
    with pytest.raises(ValueError, match="want 554 features.*got 553"):
        ExpressionTokens(TokenConfig.tiny())(torch.zeros(1, 5, 553))


def test_strength_dials(tiny):
    x = Features.unpack(torch.randn(2, 5, 554))
    assert torch.equal(strengthen(x).pack(), x.pack())
    still = strengthen(x, overall=0.0).pack()
    assert torch.allclose(still, still[:, :1].expand_as(still))
    louder = strengthen(x, mouth=2.0)
    assert torch.equal(louder.head, x.head) and torch.allclose(louder.mouth.std(1), 2 * x.mouth.std(1), rtol=1e-4)
    softer = strengthen(x, emotion=0.5, overall=0.5)
    assert torch.allclose(softer.emotion.std(1), 0.25 * x.emotion.std(1), rtol=1e-4)
    assert torch.allclose(softer.mouth.std(1), 0.5 * x.mouth.std(1), rtol=1e-4)
    silent = strengthen(x, mouth=0.0, rest=Features.unpack(torch.zeros(554)))
    assert (silent.mouth == 0).all() and torch.equal(silent.emotion, x.emotion)
    assert torch.equal(tiny(x, mouth=0.0), tiny(strengthen(x, mouth=0.0))) and not torch.allclose(tiny(x, mouth=0.0), tiny(x))


def test_wrong_groups_and_unbatched_features_are_refused():
    for learnable in (("lips",), ("mouth", "mouth")):
        with pytest.raises(ValueError, match="want each of head, eyes, emotion, mouth at most once"):
            TokenConfig(learnable=learnable)
    tokens = ExpressionTokens(TokenConfig.tiny()).eval()
    with pytest.raises(ValueError, match=r"want features \(b f 554\).*got \(24,\) \+ \(554,\)"):
        tokens(torch.rand(24, 554))
    assert tokens(torch.rand(24, 554), place=False).shape == (24, 24, 64)


def test_the_portraits_own_features_move_the_linear_tokens_and_nothing_else():
    tokens, x, own = ExpressionTokens(replace(TokenConfig.tiny(), origin=True)).eval(), torch.rand(2, 5, 554), torch.rand(2, 554)
    with torch.no_grad():
        before = tokens(x)
        assert torch.equal(tokens(x, origin=own), before)  # at first they say nothing
        for project in tokens.origin.values():
            project.weight.normal_()
        moved = tokens(x, origin=own) - before
        assert moved[:, :, 4:].abs().max() == 0 and moved[:, :, :4].abs().amin(-1).min() > 0
        assert torch.allclose(moved, moved[:, :1].expand_as(moved), atol=1e-5)  # by as much in every frame, and by the dials not at all
        assert torch.allclose(tokens(x, mouth=0.0, overall=0.5, origin=own) - tokens(x, mouth=0.0, overall=0.5), moved, atol=1e-5)
        assert torch.allclose((tokens(x, origin=own.flip(0)) - before).flip(0), moved, atol=1e-5)
        assert torch.equal(tokens(x), before)  # not told, nothing is added
    with pytest.raises(ValueError, match="want a config with origin=True for the portrait's own features, got one without"):
        ExpressionTokens(replace(TokenConfig.tiny(), origin=False))(x, origin=own)


def test_rest_is_where_a_dial_at_zero_ends():
    tokens, x = ExpressionTokens(TokenConfig.tiny()).eval(), torch.rand(1, 5, 554)
    rest = Features.unpack(torch.rand(1, 1, 554))
    with torch.no_grad():
        still = tokens(x, overall=0.0, place=False, rest=rest)
        assert torch.allclose(still, tokens(rest.pack().expand(1, 5, 554), place=False), atol=1e-5)
