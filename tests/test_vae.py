"Chapter 05: the causal VAE against diffusers' AutoencoderKLWan, causality, borders, files and the shipped tiny weights."
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fantasy_nb.core import data_samples
from fantasy_nb.vae import (CausalConv3d, VAEConfig, VideoVAE, charbonnier, decode_stream, decode_tiled, encode_stream, encode_tiled, in_pieces,
                            measure_latents, spans, train_vae)

SHARED = Path(__file__).parents[2] / "shared"
SMALL_WAN = replace(VAEConfig.wan(), widths=(16, 32, 64, 64))
SMALL_MINI = replace(VAEConfig.mini(), widths=(16, 24, 32))


def video(frames, height=32, width=48, batch=1, seed=0):
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def wan_pair():
    "Our VAE in Wan's form and diffusers' with the same weights, moved by diffusers' own key map."
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    torch.manual_seed(0)
    ours = VideoVAE(SMALL_WAN).eval()
    for name, parameter in ours.named_parameters():
        if name.endswith("gamma"): torch.nn.init.normal_(parameter.data, 1.0, 0.1)
    theirs = AutoencoderKLWan(base_dim=16, dim_mult=[1, 2, 4, 4]).eval()
    released = {name.removeprefix("model."): tensor.clone() for name, tensor in ours.release_state_dict().items()}
    theirs.load_state_dict(convert_wan_vae_to_diffusers(released), strict=True)
    return ours, theirs


@pytest.mark.parametrize("frames", [1, 5, 17])
@torch.no_grad()
def test_equals_diffusers(wan_pair, frames):
    ours, theirs = wan_pair
    x = video(frames)
    want = theirs.encode(x).latent_dist
    got = ours.posterior(x)
    for a, b in ((got.mean, want.mean), (got.log_variance, want.logvar)):
        assert ((a - b).norm() / b.norm()).item() < 1e-4
    latents = ours.encode(x)
    back, want_back = ours.decode(latents), theirs.decode(want.mean).sample
    assert back.shape == x.shape
    assert ((back - want_back).norm() / want_back.norm()).item() < 1e-4


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared reference folder")
def test_wan_names_and_shapes():
    official = json.loads((SHARED / "reference" / "official_keys.json").read_text())["vae_wan21"]
    with torch.device("meta"):
        ours = VideoVAE(replace(VAEConfig.wan(), latents_mean=(), latents_std=()))
    assert {name: list(tensor.shape) for name, tensor in ours.release_state_dict().items()} == official
    assert sum(p.numel() for p in ours.parameters()) == 126_892_531


def test_release_round_trip_and_refusal():
    torch.manual_seed(0)
    one, two = VideoVAE(SMALL_WAN), VideoVAE(SMALL_WAN)
    released = one.release_state_dict()
    two.load_release_state_dict({name.removeprefix("model."): tensor for name, tensor in released.items()})
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    released.pop("model.conv1.weight")
    with pytest.raises(ValueError, match="1 names missing"): two.load_release_state_dict(released)


def disturbed(config):
    "A VAE whose zero-initialised layers are not zero, so that nothing is hidden."
    torch.manual_seed(0)
    vae = VideoVAE(config).eval()
    for layer in (vae.encoder.leave, vae.decoder.leave): torch.nn.init.normal_(layer.weight, std=0.05)
    return vae


@pytest.mark.parametrize("config", [SMALL_WAN, VAEConfig.tiny()], ids=["wan", "tiny"])
@torch.no_grad()
def test_causal(config):
    vae, x = disturbed(config), video(13)
    z = vae.encode(x)
    for k in (1, 4, 5, 12):
        y = x.clone()
        y[:, :, k] = -y[:, :, k]
        moved = (vae.encode(y) != z).flatten(3).any(-1).any(1)[0]
        first = (k + 3) // 4
        assert not moved[:first].any() and moved[first]
    other = z.clone()
    other[:, :, 2] += 1
    changed = (vae.decode(other) != vae.decode(z)).any(1).flatten(2).any(-1)[0]
    assert not changed[:5].any() and changed[5:9].all()


def joined(pieces): return torch.cat(list(pieces), 2)


def close(a, b): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frames", [1, 5, 17])
@pytest.mark.parametrize("config", [SMALL_WAN, VAEConfig.tiny(), SMALL_MINI], ids=["wan", "tiny", "mini"])
@torch.no_grad()
def test_stream_is_the_whole(config, frames):
    "1, 4, 4, ... frames in, one latent frame out each (and back) give the whole clip's numbers; longer pieces too."
    vae, x = disturbed(config), video(frames, 24, 32)
    z, t = vae.encode(x), (frames + 3) // 4
    pieces = list(encode_stream(vae, in_pieces(x, 4)))
    assert [piece.shape[2] for piece in pieces] == [1] * t
    close(joined(pieces), z)
    close(joined(encode_stream(vae, in_pieces(x, 8))), z)
    back = vae.decode(z)
    shown = list(decode_stream(vae, in_pieces(z, 1)))
    assert [piece.shape[2] for piece in shown] == [1] + [4] * (t - 1)
    close(joined(shown), back)
    close(joined(decode_stream(vae, in_pieces(z, 3))), back)
    close(vae.encode(x), z)  # nothing stays behind in the layers


@pytest.mark.parametrize("frames", [1, 5, 17])
@torch.no_grad()
def test_shipped_weights_stream(tiny, frames):
    _, vae = tiny
    x = video(frames, 16, 24)
    z = vae.encode(x)
    close(joined(encode_stream(vae, in_pieces(x, 4))), z)
    close(joined(decode_stream(vae, in_pieces(z, 1))), vae.decode(z))


@torch.no_grad()
def test_stream_equals_diffusers(wan_pair):
    ours, theirs = wan_pair
    x = video(9)
    want = theirs.encode(x).latent_dist.mean
    got = joined(encode_stream(ours, in_pieces(x, 4))) * ours.latents_std + ours.latents_mean
    assert ((got - want).norm() / want.norm()).item() < 1e-4


@torch.no_grad()
def test_streamed_latents_never_wait_for_later_frames():
    "A frame changed later leaves the latents handed out earlier the same, bit by bit; memory does not grow."
    vae, x = disturbed(VAEConfig.tiny()), video(13, 16, 16)
    y = x.clone()
    y[:, :, 5] *= -1
    one, two = (list(encode_stream(vae, in_pieces(v, 4))) for v in (x, y))
    assert [torch.equal(a, b) for a, b in zip(one, two)] == [True, True, False, False]
    cache, held = {}, []
    for piece in in_pieces(x, 4):
        vae.encode(piece, cache=cache)
        held.append(sum(kept.untyped_storage().nbytes() for kept in cache.values()))
    assert held[1] == held[2] == held[3]


def test_streams_refuse_wrong_pieces():
    vae, x = VideoVAE(VAEConfig.tiny()), video(9, 16, 16)
    with pytest.raises(ValueError, match="want 4n frames in a later piece"): list(encode_stream(vae, [x[:, :, :1], x[:, :, 1:4]]))
    with pytest.raises(ValueError, match="trim to 1 or pad to 5"): list(encode_stream(vae, [x[:, :, :4]]))
    with pytest.raises(ValueError, match="pieces .* of one size"): list(encode_stream(vae, [x[:, :, :1], x[:, :, 1:5, :8]]))
    with pytest.raises(ValueError, match="want latents"): list(decode_stream(vae, [torch.zeros(1, 16, 1, 2, 2)]))


def test_spans_cover_everything():
    assert spans(8, 16, 4) == [(0, 8)] and spans(16, 8, 4) == [(0, 8), (4, 12), (8, 16)]
    for length in range(8, 40):
        cover = spans(length, 8, 3)
        assert cover[0][0] == 0 and cover[-1][1] == length and all(b - a == 8 for a, b in cover)
        assert all(right[0] <= left[1] - 3 for left, right in zip(cover, cover[1:]))


@torch.no_grad()
def test_tiles_are_close_to_the_whole(tiny):
    "The whole's numbers where one tile holds all. Else, measured rms: latents 0.0003 and pictures 0.0012 off (no overlap: 0.0008, 0.0072)."
    _, vae = tiny
    coarse = torch.rand(1, 3, 2, 6, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = torch.nn.functional.interpolate(coarse, (5, 96, 128), mode="trilinear")
    z = vae.encode(x)
    back = vae.decode(z)
    close(encode_tiled(vae, x, 128, 32), z)
    close(decode_tiled(vae, z, 128, 32), back)
    off = {}
    for overlap in (0, 32):
        made = encode_tiled(vae, x, 64, overlap), decode_tiled(vae, z, 64, overlap)
        assert made[0].shape == z.shape and made[1].shape == back.shape
        off[overlap] = [(a - b).square().mean().sqrt().item() for a, b in zip(made, (z, back))]
    assert off[32][0] < 1e-3 and off[32][1] < 4e-3
    assert all(a < b for a, b in zip(off[32], off[0]))


@torch.no_grad()
def test_tiles_work_for_wan():
    vae, x = disturbed(SMALL_WAN), video(5, 32, 48)
    z = encode_tiled(vae, x, 32, 16)
    assert z.shape == (1, 16, 2, 4, 6) and decode_tiled(vae, z, 32, 16).shape == x.shape


@pytest.mark.parametrize("tile, overlap, words", [(64, 64, "less than the tile"), (64, -8, "less than the tile"), (60, 16, "multiples of 8 pixels"), (64, 12, "multiples of 8 pixels")])
def test_tiles_refuse(tile, overlap, words):
    vae = VideoVAE(VAEConfig.tiny())
    with pytest.raises(ValueError, match=words): encode_tiled(vae, torch.zeros(1, 3, 1, 128, 128), tile, overlap)
    with pytest.raises(ValueError, match=words): decode_tiled(vae, torch.zeros(1, 48, 1, 16, 16), tile, overlap)


def test_causal_conv_looks_back_only():
    conv = CausalConv3d(1, 1, (3, 1, 1))
    x = torch.zeros(1, 1, 5, 1, 1)
    x[:, :, 2] = 1
    assert ((conv(x) - conv.bias.view(1, -1, 1, 1, 1)).flatten().abs() > 1e-7).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("kernel, stride", [(3, 1), ((3, 1, 1), 1), ((3, 5, 1), 1), (3, (1, 2, 2))])
def test_a_picture_takes_a_third_of_the_kernel(kernel, stride):
    "Without a stream one frame goes through a 2-D convolution: what the 3-D one says (an empty cache asks it), gradients too."
    torch.manual_seed(0)
    conv, x = CausalConv3d(4, 6, kernel, stride), torch.randn(2, 4, 1, 7, 9)
    answers = []
    for cache in (None, {}):
        conv.zero_grad()
        y = conv(x, cache)
        y.square().sum().backward()
        answers.append((y.detach(), conv.weight.grad.clone(), conv.bias.grad.clone()))
    for ours, theirs in zip(*answers): torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not answers[0][1][:, :, :-1].any() and answers[0][1][:, :, -1].all()


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_shapes(frames):
    vae = VideoVAE(VAEConfig.tiny())
    z = vae.encode(video(frames, 24, 40, batch=2))
    assert z.shape == (2, 48, (frames + 3) // 4, 3, 5)
    assert vae.decode(z).shape == (2, 3, frames, 24, 40)


@pytest.mark.parametrize("shape, words", [((1, 3, 12, 16, 16), "trim to 9 or pad to 13"), ((1, 3, 5, 20, 16), "crop to 16x16"), ((1, 1, 5, 16, 16), "want a video"), ((3, 5, 16, 16), "want a video")])
def test_clear_errors(shape, words):
    with pytest.raises(ValueError, match=words): VideoVAE(VAEConfig.tiny()).encode(torch.zeros(shape))


def test_decode_refuses_other_channels():
    vae = VideoVAE(VAEConfig.tiny())
    for wrong in ((1, 16, 1, 2, 2), (48, 1, 2, 2), (1, 48, 0, 2, 2)):
        with pytest.raises(ValueError, match="want latents"): vae.decode(torch.zeros(wrong))
        with pytest.raises(ValueError, match="want latents"): decode_tiled(vae, torch.zeros(wrong), 64, 16)


def test_config_refuses_other_factors():
    with pytest.raises(ValueError, match="8x in space"): VAEConfig(patch=2)


def test_linear_code_starts_at_pca_and_training_moves_on(tmp_path):
    "The linear start is the principal components' error; a few steps lower the loss; files give the same latents back."
    torch.manual_seed(0)
    coarse = torch.nn.functional.interpolate(torch.rand(24, 3, 3, 4, 4) * 2 - 1, (5, 32, 32), mode="trilinear")
    vae = VideoVAE(VAEConfig.tiny())
    vae.code.fit(coarse[:, None].unbind(0))
    with torch.no_grad(): start = (vae.reconstruct(vae.posterior(coarse).mean) - coarse).square().mean().item()
    assert start < 0.05 * coarse.var().item()
    losses = []
    train_vae(vae, (coarse[i % 6 * 4:][:4] for i in range(100)), 30, lr=3e-3, progress=lambda i, out, v: losses.append(out.error.item()))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    measure_latents(vae, [coarse])
    z = vae.encode(coarse)
    torch.testing.assert_close(z.std((0, 2, 3, 4)), torch.ones(48), atol=0.02, rtol=0)
    vae.save_pretrained(tmp_path)
    torch.testing.assert_close(VideoVAE.from_pretrained(tmp_path).encode(coarse), z)
    with pytest.raises(FileNotFoundError, match="config.json"): VideoVAE.from_pretrained(tmp_path / "nothing")


def test_sampling_follows_the_generator():
    vae, x = VideoVAE(VAEConfig.tiny()), video(5)
    draw = lambda seed: vae.encode(x, sample=True, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_charbonnier_is_squared_then_absolute():
    assert charbonnier(torch.tensor(0.003)).item() == pytest.approx(0.003**2 / 0.06, rel=0.01)
    assert charbonnier(torch.tensor(1.0)).item() == pytest.approx(0.97, rel=0.01)


@pytest.fixture(scope="module")
def tiny():
    folder = data_samples("weights", "tiny", "vae")
    return folder, VideoVAE.from_pretrained(folder)


@torch.no_grad()
def test_shipped_weights_rebuild_unseen_people(tiny):
    from fantasy_nb.faces import Scene, random_motion, render_scene

    folder, vae = tiny
    frames, boxes, _ = render_scene(Scene.sample(2, 910_003), [random_motion(9, 910_003 + i) for i in range(2)], (128, 192))
    clip = frames.transpose(0, 1)[None] * 2 - 1
    z = vae.encode(clip)
    error = ((clip - vae.decode(z)) / 2) ** 2
    assert -10 * error.mean().log10() > 32
    for x0, y0, x1, y1 in boxes[4].int().tolist():
        assert -10 * error[:, :, 4, y0:y1, x0:x1].mean().log10() > 26
    assert z.shape == (1, 48, 3, 16, 24) and 0.5 < z.std() < 2 and z.mean().abs() < 0.3
    assert (folder / "model.safetensors").stat().st_size <= 4.0e6
    mini = VideoVAE.from_pretrained(data_samples("weights", "mini", "vae"))
    better = ((clip - mini.decode(mini.encode(clip))) / 2) ** 2
    assert better.mean() < error.mean() and mini.encode(clip).shape == z.shape


@pytest.mark.parametrize("height, least", [(64, 32.5), (128, 34.5)])
@torch.no_grad()
def test_shipped_weights_by_size(tiny, height, least):
    "PSNR on unseen people, by the size of the picture: measured 33.7 dB at 64 and 35.8 dB at 128."
    from fantasy_nb.faces import Scene, random_motion, render_scene

    _, vae = tiny
    frames, _, _ = render_scene(Scene.sample(1, 910_011), [random_motion(5, 910_011)], (height, height))
    clip = frames.transpose(0, 1)[None] * 2 - 1
    found = -10 * ((clip - vae.decode(vae.encode(clip))) / 2).square().mean().log10().item()
    assert found > least


@torch.no_grad()
def test_shipped_weights_bear_disturbed_latents(tiny):
    "Latents a little off still decode to nearly the same picture: what a DiT hands over is never exact."
    _, vae = tiny
    z = torch.randn(1, 48, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    moved = vae.decode(z + 0.05 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1)))
    assert (moved - vae.decode(z)).abs().mean() < 0.05


def test_linear_code_finds_the_components():
    "Blocks that lie in 48 dimensions come back exactly, and the latents have unit variance."
    from fantasy_nb.vae import LinearCode, from_blocks

    g = torch.Generator().manual_seed(0)
    basis = torch.randn(48, 768, generator=g) / 10
    video = from_blocks(torch.randn(1, 3, 16, 16, 48, generator=g) @ basis)
    video = torch.cat([video[:, :, :1], video[:, :, 1:]], 2)[:, :, 1:]  # drop frame 0: a block of one frame lies elsewhere
    video = torch.cat([torch.zeros_like(video[:, :, :1]), video], 2)
    code = LinearCode(48)
    code.fit([video], noise=0.0)
    z = code.encode(video)
    assert (code.decode(z) - video).square().mean() < 1e-4 * video.square().mean()
    torch.testing.assert_close(z.var((0, 2, 3, 4), correction=0), torch.ones(48), atol=0.05, rtol=0)


def test_channel_cost_is_the_pixel_error_of_one_unit(tiny):
    from fantasy_nb.vae import channel_cost

    _, vae = tiny
    cost = channel_cost(vae)
    assert cost.shape == (48,) and (cost > 0).all() and cost.mean().item() == pytest.approx(1, rel=1e-3)
    z = torch.zeros(1, 48, 2, 5, 5)
    errors = []
    for channel in (0, 47):
        moved = z.clone()
        moved[0, channel, 1, 2, 2] = 0.5
        with torch.no_grad(): errors.append((vae.decode(moved) - vae.decode(z)).square().sum().item())
    assert errors[1] / errors[0] == pytest.approx((cost[47] / cost[0]).item(), rel=0.5)


def test_released_statistics_of_the_latents(wan_pair):
    "Mean and deviation of the wan preset are diffusers'."
    w, c = VAEConfig.wan(), wan_pair[1].config
    assert list(w.latents_mean) == list(c.latents_mean) and list(w.latents_std) == list(c.latents_std)


def test_statistics_that_are_empty_are_0_and_1():
    vae = VideoVAE(replace(VAEConfig.tiny(), latents_mean=(3.0,) * 48, latents_std=(2.0,) * 48))
    assert vae.latents_mean.unique().item() == 3 and vae.latents_std.unique().item() == 2
    vae.set_latent_stats(replace(vae.config, latents_mean=()))
    assert not vae.latents_mean.any() and vae.latents_std.unique().item() == 2
    vae.set_latent_stats(replace(vae.config, latents_std=()))
    assert not vae.latents_mean.any() and vae.latents_std.unique().item() == 1


@torch.no_grad()
def test_equals_diffusers_at_full_width():
    "The wan preset itself, 127 million random parameters, five frames of 16x16."
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    torch.manual_seed(0)
    ours, theirs = VideoVAE(VAEConfig.wan()).eval(), AutoencoderKLWan().eval()
    theirs.load_state_dict(convert_wan_vae_to_diffusers({n.removeprefix("model."): t for n, t in ours.release_state_dict().items()}), strict=True)
    clip = video(5, 16, 16)
    want = theirs.encode(clip).latent_dist.mean
    assert (ours.posterior(clip).mean - want).norm() <= 1e-4 * want.norm()
    back = theirs.decode(want).sample
    assert (ours.reconstruct(want).clamp(-1, 1) - back).norm() <= 1e-4 * back.norm()


def test_one_cache_may_serve_both_ways():
    torch.manual_seed(0)
    vae, clip, cache = VideoVAE(VAEConfig.tiny()).eval(), video(5), {}
    with torch.no_grad():
        latents = vae.encode(clip[:, :, :1], cache=cache)
        assert vae.decode(latents, cache=cache).shape[2] == 1  # latent frame 0, although the cache is not empty
        assert vae.decode(vae.encode(clip[:, :, 1:], cache=cache), cache=cache).shape[2] == 4


def test_training_that_runs_out_of_batches_says_so():
    with pytest.raises(ValueError, match="want 3 batches, got 1"):
        train_vae(SMALL_MINI, [video(5, 16, 16)], 3)
    train_vae(SMALL_MINI, [video(5, 16, 16)] * 2, 1, fit=(video(5, 16, 16, seed=k) for k in range(3)))


@pytest.mark.parametrize("size", [(0, 8, 8), (1, 4, 4), (1, 0, 8)])
def test_empty_videos_are_refused(size):
    with pytest.raises(ValueError, match="at least one frame of 8x8"):
        VideoVAE(VAEConfig.tiny()).encode(torch.zeros(1, 3, *size))
