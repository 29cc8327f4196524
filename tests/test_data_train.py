import copy
import csv
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import pytest
import torch
from safetensors.torch import load_file, save_file

import fantasy_nb.train as train_module
from fantasy_nb.animate import PortraitPipeline
from fantasy_nb.core import data_samples
from fantasy_nb.data import ClipConfig, SceneClips, collate
from fantasy_nb.dit import DiTConfig
from fantasy_nb.expression import FEATURE_WIDTHS, ExpressionConfig, ExpressionEncoder, last_layer
from fantasy_nb.faces import Expression, Identity, render_crops
from fantasy_nb.flow import flow_loss
from fantasy_nb.tokens import ExpressionTokens, TokenConfig
from fantasy_nb.train import (Animator, LatentClips, TrainConfig, animator_loss, carries_expression, channel_weights, encode_clips, encode_stills, forget_expression, held_out_loss, image_condition,
                              load_checkpoint, loss_weight, main, mirrored, owners_from_portrait, pick_moments, pixel_decoder, step_generator, train, weight_of_pixels)
from fantasy_nb.vae import VideoVAE

SMALL = TrainConfig(steps=6, batch=2, warmup=2)


def small_animator(seed=0):
    torch.manual_seed(seed)
    return Animator(replace(DiTConfig.tiny(), layers=1, width=96, heads=3, ffn=128), replace(TokenConfig.tiny(), width=96))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    "A cache of eight clips of noise, in the shape of real ones."
    folder, g = tmp_path_factory.mktemp("cache"), torch.Generator().manual_seed(0)
    rows = {}
    for i in range(8):
        p = 1 + i % 2
        owners = owners_from_portrait(torch.tensor([[8.0, 8, 40, 56], [72, 8, 104, 56]])[:p], (64, 128), 13)
        rows |= {f"{i}.latents": torch.randn(48, 4, 8, 16, generator=g).half(), f"{i}.features": torch.randn(p, 13, 554, generator=g).half(),
                 f"{i}.owners": owners, f"{i}.weight": torch.ones(1, 4, 8, 16).half()}
    save_file(rows, folder / "clips-000000.safetensors")
    return folder


def test_clips_are_functions_of_seed_and_index():
    clips = SceneClips(ClipConfig(height=64, crop=32), seed=5)
    a, b, c = clips[2], clips[2], SceneClips(ClipConfig(height=64, crop=32), seed=6)[2]
    assert torch.equal(a.frames, b.frames) and torch.equal(a.crops, b.crops) and not torch.equal(a.frames, c.frames)
    assert a.frames.shape == (9, 3, 64, 96) and a.crops.shape == (2, 9, 3, 32, 32) and a.boxes.shape == (9, 2, 4)
    batch = collate([clips[0], clips[2]])
    assert batch["frames"].shape == (2, 3, 9, 64, 96) and batch["frames"].abs().max() <= 1
    with pytest.raises(ValueError, match="one shape"):
        collate([clips[0], clips[1]])
    with pytest.raises(ValueError, match="4n"):
        ClipConfig(frames=12)
    with pytest.raises(IndexError):
        SceneClips(length=3)[3]


def test_the_driver_is_somebody_else_with_the_same_expression():
    clip = SceneClips(ClipConfig(people=(1,)), seed=2)[0]
    from fantasy_nb.faces import Identity, render_crops

    again = render_crops(Identity.sample(1, (2 * 1_000_003) * 64 + 2), clip.motions[0], 64)
    assert (again - (clip.crops[0] / 127.5 - 1)).abs().mean() < 0.15


def test_drivers_are_cropped_as_the_encoder_wants_them():
    from fantasy_nb.expression import ExpressionConfig, ExpressionEncoder
    from fantasy_nb.faces import Identity, render_crops
    from fantasy_nb.train import as_heard

    encoder = ExpressionEncoder(ExpressionConfig(image_size=32, width=16, depth=1, hidden=32, heatmaps=8, readout=2, mouth_embed=0, closer=1.7))
    clip = SceneClips(as_heard(ClipConfig(people=(1,)), encoder), seed=2)[0]
    who = Identity.sample(1, (2 * 1_000_003) * 64 + 2)
    near, far = (render_crops(who, clip.motions[0], 32, closer=closer) for closer in (1.7, 1.0))
    off = lambda crops: (crops - (clip.crops[0] / 127.5 - 1)).abs().mean()
    assert clip.crops.shape[-1] == 32 and off(near) < 0.15 < off(far)


def test_image_condition_marks_frame_zero_only_and_holds_the_portrait():
    portrait = torch.randn(2, 48, 1, 4, 6)
    held, wan = image_condition(portrait, 3), image_condition(portrait, 3, hold=False)
    assert held.shape == wan.shape == (2, 52, 3, 4, 6)
    assert (held[:, :4, 0] == 1).all() and (held[:, :4, 1:] == 0).all() and torch.equal(held[:, :4], wan[:, :4])
    assert torch.equal(held[:, 4:], portrait.expand(-1, -1, 3, -1, -1)) and (wan[:, 4:, 1:] == 0).all() and torch.equal(wan[:, 4:, :1], portrait)


def test_loss_weight_is_heaviest_at_the_mouth():
    boxes = torch.tensor([16.0, 16, 80, 96]).expand(1, 5, 1, 4)
    w = loss_weight(boxes, (16, 16))[0, 0]
    assert w.shape == (2, 16, 16) and w[1, 0, 0] == 1 and w[1, 4, 4] == 4 and w[1].max() == 8 and w[0].max() == 2
    rows = torch.nonzero(w[1] == 8)[:, 0].float()
    assert 7 < rows.mean() < 11


def test_step_zero_holds_the_portrait(cache):
    animator, batch = small_animator(), LatentClips(cache).stack([1, 3])
    t = torch.tensor([0.5, 0.9])
    answers = [animator(batch["latents"], t, batch["latents"][:, :, :1], f, batch["owners"]) for f in (batch["features"], torch.randn_like(batch["features"]))]
    assert torch.equal(*answers) and torch.equal(answers[0], batch["latents"][:, :, :1].expand_as(answers[0]))


def test_weights_without_an_origin_go_on_with_one_of_zeros(tmp_path):
    old = Animator(DiTConfig.tiny(), replace(TokenConfig.tiny(), origin=False))
    old.save_pretrained(tmp_path)
    args = train_module.build_parser().parse_args(["--stage", "stills"])
    new = train_module.load_animator(args, "stills", tmp_path, "cpu")
    state = new.state_dict()
    assert all(torch.equal(value, state.pop(name)) for name, value in old.state_dict().items())
    assert len(state) == 4 and all(name.startswith("tokens.origin.") and value.abs().max() == 0 for name, value in state.items())
    Animator(DiTConfig.mini(), replace(TokenConfig.mini(), origin=False)).save_pretrained(tmp_path / "mini")
    with pytest.raises(ValueError, match="to hold an animator of size tiny, got another one"):
        train_module.load_animator(args, "stills", tmp_path / "mini", "cpu")


def test_what_is_drawn_depends_on_the_portraits_own_features_too(cache):
    animator = small_animator()
    torch.nn.init.normal_(animator.tokens.origin["head"].weight)
    batch = LatentClips(cache).stack([1])
    for stills in (False, True):
        features = batch["features"][:, :, :2] if stills else batch["features"]
        owners = batch["owners"][:, :1] if stills else batch["owners"]
        own, later = features.clone(), features.clone()
        own[:, 0, 0, :6] += 1  # another head in the portrait
        later[:, 0, 1, :6] += 1  # in a later moment
        heard, by_own, by_later = (animator.listen(x, owners, stills)[0].unflatten(2, (2, -1)) for x in (features, own, later))
        assert heard.shape[1] == (1 if stills else batch["latents"].shape[2])
        assert (by_own - heard)[:, :, 0].abs().amax((0, 2, 3)).min() > 0  # is heard in every latent frame, by the one whose portrait it is
        assert (by_own - heard)[:, :, 1].abs().max() < 1e-4
        assert (by_later - heard)[:, -1 if stills else 1, 0].abs().max() > 0
    with pytest.raises(ValueError, match="the portrait's own first, for 1 latent frames, got"):
        animator.listen(batch["features"][:, :, :1], batch["owners"][:, :1], True)


def test_after_training_each_person_listens_to_their_own_features_in_the_expression_branch(cache):
    animator = small_animator()
    train(animator, LatentClips(cache), SMALL, show=False)
    batch = LatentClips(cache).stack([1])
    features = batch["features"].requires_grad_()
    memory = animator.dit.blocks[0].cross_attention.memories["expression"]
    expression, mask = animator.listen(features, batch["owners"])
    key, value = memory.keys_values(expression)
    n = mask.shape[2]
    query = torch.randn(1, 4 * n, 3, 32)
    out = memory(query, key, value, memory.guard(key, mask, 1.0, (1, 4, n)))
    for person in (0, 1):
        mine = (batch["owners"][0] == person + 1).flatten()
        (gradient,) = torch.autograd.grad(out[0, mine].square().sum(), features, retain_graph=True)
        assert gradient[0, person].abs().sum() > 0 and (gradient[0, 1 - person] == 0).all()


def test_loss_falls_and_resuming_is_exact(cache, tmp_path):
    clips, whole, config = LatentClips(cache), small_animator(), replace(SMALL, steps=30, lr=1e-2)
    before = held_out_loss(whole, clips, [0, 1, 2, 3], config)
    train(whole, clips, config, tmp_path / "whole", save_every=7, show=False)
    assert held_out_loss(whole, clips, [0, 1, 2, 3], config) < before
    broken = small_animator()
    train(broken, clips, config, tmp_path / "broken", max_minutes=0, show=False)
    resumed = small_animator(seed=9)
    train(resumed, clips, config, tmp_path / "broken", resume=True, show=False)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()):
        assert torch.equal(a, b)
    losses = [[float(row["loss"]) for row in csv.DictReader(open(tmp_path / run / "log.csv"))] for run in ("whole", "broken")]
    assert losses[0] == losses[1] and len(losses[0]) == 30


def test_another_config_is_refused(cache, tmp_path):
    clips, config = LatentClips(cache), SMALL
    ema = train(small_animator(), clips, config, tmp_path, show=False)
    other = small_animator()
    with pytest.raises(ValueError, match="another run"):
        load_checkpoint(tmp_path / "checkpoint.pt", other, torch.optim.AdamW(other.parameters()), ema, replace(config, lr=1.0))


def test_nan_stops_the_run_and_names_the_step(cache):
    animator = small_animator()
    with torch.no_grad():
        animator.dit.head.head.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 0 is nan; clips \[\d, \d\]; there is no checkpoint yet"):
        train(animator, LatentClips(cache), SMALL, show=False)


def test_killed_in_the_middle_of_saving_the_old_checkpoint_is_whole(cache, tmp_path):
    script = f"""
import torch
from dataclasses import replace
from fantasy_nb.dit import DiTConfig
from fantasy_nb.tokens import ExpressionTokens, TokenConfig
from fantasy_nb.train import *
torch.set_num_threads(1)
torch.manual_seed(0)
a = Animator(replace(DiTConfig.tiny(), layers=1, width=96, heads=3, ffn=128), replace(TokenConfig.tiny(), width=96))
train(a, LatentClips({str(cache)!r}), TrainConfig(steps=100000, batch=1), Path({str(tmp_path)!r}), save_every=1, show=False)
"""
    process = subprocess.Popen([sys.executable, "-c", "from pathlib import Path\n" + script])
    checkpoint, deadline = tmp_path / "checkpoint.pt", time.time() + 120
    while not checkpoint.exists() and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = torch.load(checkpoint, weights_only=True)
    assert state["step"] >= 1 and set(state) == {"step", "model", "ema", "optimizer", "config"}


@pytest.mark.parametrize("kilobytes", [40, 2000])
def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(cache, tmp_path, kilobytes):
    "No file may grow beyond a limit: as a full disk would, it stops the cache (40 KB) or the checkpoint (2 MB)."
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "cache").mkdir()
    if kilobytes > 40:
        (tmp_path / "cache" / "clips").symlink_to(cache)
    script = f"""
import resource, signal, sys
from pathlib import Path
import fantasy_nb.train as t

def begin(*arguments, learn=t.train, **named):
    Path({str(run / "checkpoint.pt")!r}).write_bytes(b"an old one")
    return learn(*arguments, **named)

t.train = begin
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes} * 1024,) * 2)
sys.exit(t.main(["--stage", "clips", "--run", {str(run)!r}, "--cache", {str(tmp_path / "cache")!r}, "--clips", "{1 if kilobytes == 40 else 0}", "--steps", "1", "--batch", "1", "--threads", "1", "--samples", "0"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("fantasy-train: cannot write"), done.stderr
    assert kilobytes == 40 or (run / "checkpoint.pt").read_bytes() == b"an old one"
    assert not [p for p in tmp_path.rglob("*") if "part" in p.name]


def test_saved_animator_comes_back(tmp_path, cache):
    animator = small_animator()
    train(animator, LatentClips(cache), SMALL, show=False)
    animator.eval().save_pretrained(tmp_path)
    again, batch = Animator.from_pretrained(tmp_path), LatentClips(cache).stack([1])
    arguments = batch["latents"], torch.tensor([0.7]), batch["latents"][:, :, :1], batch["features"], batch["owners"]
    with torch.no_grad():
        assert torch.equal(animator(*arguments), again(*arguments))
    (tmp_path / "tokens" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="tokens/model.safetensors"):
        Animator.from_pretrained(tmp_path)


def test_cache_is_made_of_whole_shards_and_kept(tmp_path):
    parts = [kind.from_pretrained(data_samples("weights", "tiny", part)) for kind, part in ((VideoVAE, "vae"), (ExpressionEncoder, "encoder"))]
    clips = SceneClips(ClipConfig(frames=5, height=64), seed=1)
    encode_clips(clips, 3, tmp_path, *parts, shard=2, show=False)
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == ["clips-000000.safetensors", "clips-000002.safetensors"]
    stamps = [f.stat().st_mtime_ns for f in files]
    encode_clips(clips, 3, tmp_path, *parts, shard=2, show=False)
    assert stamps == [f.stat().st_mtime_ns for f in files] and len(LatentClips(tmp_path)) == 6  # every clip and its mirror image
    before = load_file(files[1])
    encode_clips(clips, 4, tmp_path, *parts, shard=2, show=False)  # a file that is not full yet is filled up
    after = load_file(files[1])
    assert len(LatentClips(tmp_path)) == 8 and stamps[0] == files[0].stat().st_mtime_ns and all(torch.equal(after[name], before[name]) for name in before)
    encode_clips(clips, 3, tmp_path / "two", *parts, shard=2, show=False, processes=2)  # helpers fill the same files
    one, two = LatentClips(tmp_path), LatentClips(tmp_path / "two")
    assert len(two) == 6 and all((one.clips[i][name].float() - two.clips[i][name].float()).abs().max() < 2e-2 for i in range(6) for name in one.clips[i])
    encode_clips(clips, 1, tmp_path / "later", *parts, shard=2, show=False, first=2)  # other scenes than those before
    later = LatentClips(tmp_path / "later")
    assert sorted(later.clips) == [4, 5] and all(torch.equal(later.clips[4][name], one.clips[4][name]) for name in one.clips[4])
    with pytest.raises(ValueError, match="where a file of 2 begins, got 3"):
        encode_clips(clips, 1, tmp_path / "later", *parts, shard=2, show=False, first=3)
    weights = channel_weights(parts[0])
    assert weights.shape == (48, 1, 1, 1) and abs(weights.mean() - 1) < 1e-5
    out = animator_loss(Animator.tiny(), LatentClips(tmp_path).stack([0]), TrainConfig(), step_generator(0, 0))
    assert torch.isfinite(out.loss)
    with pytest.raises(FileNotFoundError, match="fill it first"):
        LatentClips(tmp_path / "nothing")


def test_pixel_loss_is_the_weighted_mean_of_absolute_errors_of_pixels(cache):
    vae, batch = VideoVAE.from_pretrained(data_samples("weights", "tiny", "vae")), LatentClips(cache).stack([1])
    batch["weight"] = 1 + torch.rand(1, 1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    decode, animator = pixel_decoder(vae), small_animator()
    for p in animator.dit.head.parameters():
        torch.nn.init.zeros_(p)  # the network adds nothing: its answer is the portrait, held
    config = replace(SMALL, loss="pixels", drop_expression=0.0)
    out = animator_loss(animator, batch, config, step_generator(0, 0), decode)
    video = lambda z: vae.code.decode(z * vae.latents_std + vae.latents_mean)
    error = (video(batch["latents"][:, :, :1].expand(-1, -1, 4, -1, -1)) - video(batch["latents"])).abs()
    weight = torch.nn.functional.interpolate(batch["weight"][0], scale_factor=8.0)[None]
    weight = torch.cat([weight[:, :, :1], weight[:, :, 1:].repeat_interleave(4, 2)], 2)
    assert torch.equal(weight, weight_of_pixels(batch["weight"])) and weight.shape[2:] == video(batch["latents"]).shape[2:]
    assert out.loss.item() == pytest.approx(((error * weight).sum() / weight.expand_as(error).sum()).item(), rel=0.01)
    out.loss.backward()
    assert any(p.grad.abs().sum() > 0 for p in animator.dit.head.parameters()) and not any(p.requires_grad for p in vae.parameters())
    with pytest.raises(ValueError, match='loss="pixels"'):
        train(animator, LatentClips(cache), config, show=False)  # no decoder
    with pytest.raises(ValueError, match="got 'sharp'"):
        train(animator, LatentClips(cache), replace(SMALL, loss="sharp"), show=False)


def test_pixel_training_resumes_exactly(cache, tmp_path):
    decode = pixel_decoder(VideoVAE.from_pretrained(data_samples("weights", "tiny", "vae")))
    config, whole, broken = replace(SMALL, loss="pixels"), small_animator(), small_animator()
    train(whole, LatentClips(cache), config, decode=decode, show=False)
    train(broken, LatentClips(cache), config, tmp_path, max_minutes=0, save_every=1, decode=decode, show=False)
    resumed = small_animator(7)
    train(resumed, LatentClips(cache), config, tmp_path, resume=True, decode=decode, show=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    assert not all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), small_animator().state_dict().values()))


def test_command_end_to_end(tmp_path, cache, capsys):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "clips").symlink_to(cache)
    arguments = ["--stage", "clips", "--run", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--clips", "0", "--steps", "2", "--batch", "1", "--threads", "1"]
    assert main([*arguments, "--out", str(tmp_path / "weights")]) == 0
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    ready = PortraitPipeline.from_pretrained(tmp_path / "weights")  # all that an animation needs
    assert ready.settings == PortraitPipeline.from_pretrained("tiny").settings  # used as the shipped weights are
    shipped = ExpressionEncoder.from_pretrained(data_samples("weights", "tiny", "encoder")).state_dict()
    assert all(torch.equal(value, shipped[name]) for name, value in ready.encoder.state_dict().items())
    assert main([*arguments[:4], "--cache", str(cache), "--clips", "0"]) == 2 and "one folder down" in capsys.readouterr().err
    logged = (tmp_path / "run" / "log.csv").read_text()
    assert main(arguments) == 2 and f"want --resume to go on with {tmp_path / 'run'}, or another --run" in capsys.readouterr().err
    assert not (tmp_path / "run" / "weights").exists() and (tmp_path / "run" / "log.csv").read_text() == logged
    assert main(["--parts", str(tmp_path / "nowhere"), "--run", str(tmp_path / "run2")]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_mirrored_clip_moves_boxes_and_drivers_along():
    clip = SceneClips(ClipConfig(frames=5), seed=4)[0]
    other, width = mirrored(clip, 0), clip.frames.shape[-1]
    assert torch.equal(other.crops, clip.crops.flip(-1)) and other.frames.shape == clip.frames.shape and other.frames.dtype == torch.uint8
    assert torch.equal(other.boxes[..., 0], width - clip.boxes[..., 2]) and (other.boxes[..., 2] > other.boxes[..., 0]).all()
    plain, seen = clip.frames.flip(-1).float().flatten(2).flatten(0, 1), other.frames.float().flatten(2).flatten(0, 1)
    r = [torch.corrcoef(torch.stack([a, b]))[0, 1].item() for a, b in zip(plain, seen)]
    assert min(r) > 0.9 and not torch.equal(other.frames, clip.frames.flip(-1)), r  # the same picture, another lamp


def test_whole_clips_show_faces_of_the_same_size_with_more_around():
    config = ClipConfig(frames=5)
    near, far = (SceneClips(config, seed=4)[k] for k in (6, 7))
    heights = [(c.boxes[0, :, 3] - c.boxes[0, :, 1]).mean().item() for c in (near, far)]
    assert far.frames.shape[-1] > near.frames.shape[-1] and abs(heights[0] / heights[1] - 1) < 0.15, heights


def in_processes(tmp_path, body, count=2):
    "Run a script in several processes, as torchrun does; what each saved as rankK.pt."
    script = tmp_path / "several.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import os, math, torch
from dataclasses import replace
from pathlib import Path
from test_data_train import SMALL, small_animator
from fantasy_nb.train import *
torch.set_num_threads(1)
rank, here = int(os.environ["RANK"]), Path({str(tmp_path)!r})
{body}
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:3000]
    return [torch.load(tmp_path / f"rank{k}.pt", weights_only=True) for k in range(count)]


def test_two_processes_average_gradients_and_end_alike(tmp_path, cache):
    "Half a batch each gives the gradient of the whole batch, one late process stops all, and both leave their group before Python ends."
    states = in_processes(tmp_path, f"""
import atexit
atexit.register(lambda: (here / f"left{{rank}}").write_text(str(not torch.distributed.is_initialized())))  # runs after what is registered later
clips = LatentClips({str(cache)!r})
animator = small_animator()
train(animator, clips, SMALL, here / "run", show=False, max_minutes=math.inf)
late = small_animator()
train(late, clips, SMALL, here / "late", show=False, max_minutes=0 if rank else math.inf)
torch.save(animator.state_dict(), here / f"rank{{rank}}.pt")
""")
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states)))
    assert torch.load(tmp_path / "late" / "checkpoint.pt", weights_only=True)["step"] == 1
    assert (tmp_path / "run" / "checkpoint.pt").exists() and len(list(csv.DictReader(open(tmp_path / "run" / "log.csv")))) == SMALL.steps
    start = small_animator().state_dict()
    assert any(not torch.equal(a, start[name]) for name, a in states[0].items())
    assert [(tmp_path / f"left{k}").read_text() for k in range(2)] == ["True", "True"]


def test_each_process_takes_its_share_and_gradients_are_those_of_the_whole_batch(tmp_path, cache):
    gradients = in_processes(tmp_path, f"""
import fantasy_nb.train as t
clips, animator, seen = LatentClips({str(cache)!r}), small_animator(), {{}}
stack = clips.stack
clips.stack = lambda drawn: seen.update(drawn=drawn) or stack(drawn)
t.step_generator = lambda seed, step, rank=0: torch.Generator().manual_seed(7)  # the same noise for every sample
t.uniform_times = lambda n, shift, g: torch.full((n,), 0.5)
randn = torch.randn
torch.randn = lambda shape, generator=None: randn((1, *shape[1:]), generator=torch.Generator().manual_seed(3)).expand(shape)
train(animator, clips, replace(SMALL, steps=1, batch=2, pure_noise=0.0, drop_expression=0.0, clip=1e9), show=False)
torch.save({{"drawn": seen["drawn"], "gradients": [p.grad for p in animator.parameters() if p.grad is not None]}}, here / f"rank{{rank}}.pt")
""")
    (a, b), clips = gradients, LatentClips(cache)
    assert len(a["drawn"]) == len(b["drawn"]) == 1
    assert [*a["drawn"], *b["drawn"]] == clips.draw(2, torch.Generator().manual_seed(7))
    animator = small_animator()
    batch, noise = clips.stack([*a["drawn"], *b["drawn"]]), torch.randn((1, *clips.clips[0]["latents"].shape), generator=torch.Generator().manual_seed(3))
    noise = noise.expand_as(batch["latents"])
    out = flow_loss(lambda x, t: animator(x, t, batch["latents"][:, :, :1], batch["features"], batch["owners"]), batch["latents"], torch.full((2,), 0.5), noise, "clean", batch["weight"])
    out.loss.backward()
    mine = [p.grad for p in animator.parameters() if p.grad is not None]
    for x, y, z in zip(a["gradients"], b["gradients"], mine, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=1e-3, atol=1e-6)


def test_weights_spread_over_processes_are_gathered_and_go_on_alone(tmp_path, cache):
    "FSDP (torch's own fully_shard: Accelerate does not offer it on a CPU): two processes hold half of the weights each; one process resumes their checkpoint."
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "clips").symlink_to(cache)
    in_processes(tmp_path, f"""
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

def prepare(self, model, optimizer):
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    groups = parameter_groups(model, SMALL)
    optimizer = torch.optim.AdamW(groups, lr=SMALL.lr, betas=(0.9, 0.98), weight_decay=SMALL.weight_decay)
    optimizer.optimizer = optimizer
    return model, optimizer

Accelerator.prepare = prepare
import fantasy_nb.train as t
t.Animator.tiny = classmethod(lambda cls: small_animator())
assert t.main(["--stage", "clips", "--run", str(here / "command"), "--cache", str(here / "cache"), "--clips", "0", "--steps", "2", "--batch", "2", "--samples", "1", "--loss", "latents"]) == 0
ema = train(small_animator(), LatentClips({str(cache)!r}), SMALL, here / "run", max_minutes=0, show=False)
torch.save(whole(ema.shadow), here / f"rank{{rank}}.pt")
""")
    written, averaged = Animator.from_pretrained(tmp_path / "command" / "weights").state_dict(), torch.load(tmp_path / "command" / "checkpoint.pt", weights_only=True)["ema"]
    assert all(torch.equal(written[name].half(), value.half()) for name, value in averaged.items())  # the command, too, writes whole weights
    assert len(list((tmp_path / "command" / "samples").iterdir())) == 2
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 1 and {k: v.shape for k, v in state["model"].items()} == {k: v.shape for k, v in small_animator().state_dict().items()}
    alone = small_animator(3)
    train(alone, LatentClips(cache), SMALL, tmp_path / "run", resume=True, show=False)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == SMALL.steps
    assert [int(row["step"]) for row in csv.DictReader(open(tmp_path / "run" / "log.csv"))] == list(range(SMALL.steps))  # none was done twice


def test_a_checkpoint_goes_back_to_where_the_run_is():
    "Read on the CPU, its average must lie where the weights do (a GPU's stand-in: the meta device)."
    there = train_module.spread_like({"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2, device="meta"), "b": torch.ones(3)})
    assert {name: value.device.type for name, value in there.items()} == {"a": "meta", "b": "cpu"}


@pytest.mark.parametrize("options", [{"learn_base": 0.0}, {"learn_expression": 0.0, "drop_expression": 1.0}])
def test_training_with_a_frozen_part_resumes_exactly(cache, tmp_path, options):
    clips, config, unbroken, resumed = LatentClips(cache), replace(SMALL, **options), small_animator(), small_animator(5)
    train(unbroken, clips, config, show=False)
    train(small_animator(), clips, config, tmp_path, max_minutes=0, show=False)
    train(resumed, clips, config, tmp_path, resume=True, show=False)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.state_dict().values(), resumed.state_dict().values()))


def test_a_frozen_part_stays_and_an_adapter_begins_as_its_base(cache):
    clips, start = LatentClips(cache), small_animator().state_dict()
    for options, moves in (({"learn_base": 0.0}, True), ({"learn_expression": 0.0}, False)):
        animator = small_animator()
        train(animator, clips, replace(SMALL, **options), show=False)
        for name, value in animator.state_dict().items():
            if carries_expression(name) != moves:
                assert torch.equal(value, start[name]), name
        assert any(not torch.equal(value, start[name]) for name, value in animator.state_dict().items() if carries_expression(name) == moves)
    with pytest.raises(ValueError, match="learn_base=0"):
        train(small_animator(), clips, replace(SMALL, learn_base=0.0, learn_expression=0.0), show=False)
    base, batch = small_animator(), clips.stack([1])
    for p in base.dit.head.parameters():
        torch.nn.init.normal_(p)
    arguments = batch["latents"], torch.tensor([0.7]), batch["latents"][:, :, :1], batch["features"], batch["owners"]
    with torch.no_grad():
        silent, talking = base(*arguments, 0.0), base(*arguments)
        adapter = forget_expression(base)
        assert torch.equal(adapter(*arguments), silent) and not torch.equal(talking, silent)


def test_image_and_text_are_dropped_independently_of_the_expression(cache):
    animator = Animator(replace(DiTConfig.tiny(), layers=1, width=96, heads=3, ffn=128, text_width=8), replace(TokenConfig.tiny(), width=96))
    for block in animator.dit.blocks:
        torch.nn.init.normal_(block.cross_attention.out.weight)
    seen, forward = [], Animator.forward

    def spy(self, x_t, t, portrait, features, owners, scale, stills, image_scale, text):
        seen.append((scale, image_scale, text.abs().sum((1, 2)) > 0))
        return forward(self, x_t, t, portrait, features, owners, scale, stills, image_scale, text)

    Animator.forward = spy
    try:
        batch = LatentClips(cache).stack([1] * 64) | {"text": torch.ones(64, 5, 8)}
        config = replace(SMALL, drop_expression=0.5, drop_image=0.5, drop_text=0.5)
        animator_loss(animator, batch, config, step_generator(0, 0)).loss.backward()
    finally:
        Animator.forward = forward
    kept = torch.stack([x.bool() for x in seen[0]])
    assert ((kept.sum(1) > 16) & (kept.sum(1) < 48)).all()
    assert len({tuple(row) for row in kept.T.tolist()}) == 8  # every combination occurs
    torch.nn.init.normal_(animator.dit.head.head.weight)  # zero at first: it would answer 0 whatever it is shown
    one, other = {k: v[:1] for k, v in batch.items()}, torch.randn(1, 48, 1, 8, 16)

    def answer(portrait, image_scale):
        arguments = one["latents"], torch.tensor([0.7]), portrait, one["features"], one["owners"], 1.0, False, torch.tensor([image_scale]), one["text"]
        return animator(*arguments)

    own = one["latents"][:, :, :1]
    with torch.no_grad():
        assert torch.equal(answer(other, 0.0), answer(own, 0.0))
        assert ((answer(other, 1.0) - other) - (answer(own, 1.0) - own)).abs().max() > 1e-2


def stills_config(**options):
    return ClipConfig(frames=4, stills=True, people=(2,), whole=(), **options)


def test_stills_are_a_calm_portrait_and_moments_without_a_motion():
    clips, clip = SceneClips(stills_config(), seed=4), SceneClips(stills_config(), seed=4)[0]
    assert clip.frames.shape == (4, 3, 64, 96) and clip.crops.shape == (2, 4, 3, 64, 64)
    drawn = [clips.motion(64 * k) for k in range(60)]
    portraits, moments = (torch.cat([m.yaw[part] for m in drawn]) for part in (slice(0, 1), slice(1, None)))
    assert portraits.std() < 6 < moments.std() < 16
    assert all(m.blink_left[0] == 0 for m in drawn) and any((m.blink_left[1:] > 0.3).any() for m in drawn)
    film = SceneClips(ClipConfig(head=(0.5, 0.5)), seed=4).motion(7)
    whole = SceneClips(ClipConfig(head=(1.0, 1.0)), seed=4).motion(7)
    torch.testing.assert_close(film.yaw[1:], whole.yaw[1:] / 2)
    assert torch.equal(film.mouth_open, whole.mouth_open)


def test_encoded_stills_become_samples_of_one_moment():
    clip, tiny = SceneClips(stills_config(), seed=4)[0], data_samples("weights", "tiny")
    vae, encoder = VideoVAE.from_pretrained(tiny / "vae").eval(), ExpressionEncoder.from_pretrained(tiny / "encoder")
    row = encode_stills(clip, vae, encoder)
    assert {k: tuple(v.shape) for k, v in row.items()} == {"latents": (48, 4, 8, 12), "features": (2, 4, 554), "owners": (1, 96), "weight": (1, 4, 8, 12)}
    batch = {k: v[None] if k == "owners" else v[None].float() for k, v in row.items()}
    picked = pick_moments(batch, torch.Generator().manual_seed(0))
    assert set(picked) == {"latents", "features", "weight", "portrait", "owners"}
    assert picked["owners"].shape == (2, 1, 96) and all(torch.equal(p, batch["latents"][0, :, :1]) for p in picked["portrait"])
    sources = [[j for j in range(4) if torch.equal(x[:, 0], batch["latents"][0, :, j])] for x in picked["latents"]]
    assert all(len(s) == 1 and s[0] > 0 for s in sources) and sources[0] != sources[1]  # never the portrait
    for x, w, (j,) in zip(picked["features"], picked["weight"], sources):  # each moment brings its own features and weight along, and the portrait's before them
        assert torch.equal(x, batch["features"][0][:, [0, j]]) and torch.equal(w[:, 0], batch["weight"][0, :, j])


def test_new_views_move_pictures_weights_and_regions_alike():
    vae, g = VideoVAE.from_pretrained(data_samples("weights", "tiny", "vae")).eval(), torch.Generator().manual_seed(0)
    views, (n, h, w) = train_module.NewViews(vae), (48, 8, 12)
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    blob = torch.exp(-((x - 5.5) ** 2 + (y - 4) ** 2) / 6).expand(n, 1, h, w)  # two moments of 24 scenes: what is bright weighs much
    latents = views.latents(torch.nn.functional.interpolate(blob, scale_factor=8, mode="bilinear").expand(-1, 3, -1, -1) * 0.4 - 0.6)[:, :, None]
    owners = (1 + (x >= 6)).flatten().to(torch.uint8).expand(n, 1, -1)
    batch = {"portrait": latents, "latents": latents, "weight": blob[:, :, None], "owners": owners, "features": torch.randn(n, 2, 1, 554, generator=g)}
    untouched, moved = views(batch, g, 0.0), views(batch, g, 1.0)
    assert all(torch.equal(untouched[name], batch[name]) for name in batch if name != "weight")
    torch.testing.assert_close(untouched["weight"], batch["weight"])
    assert torch.equal(moved["portrait"], moved["latents"]) and torch.equal(moved["features"], batch["features"])  # both under one shift, zoom and lamp
    assert torch.equal(moved["latents"][0], moved["latents"][1]) and not torch.equal(moved["latents"][0], moved["latents"][2])  # each scene its own
    shown = torch.nn.functional.avg_pool2d(views.pixels(moved["latents"][:, :, 0]).mean(1, keepdim=True), 8)
    r = lambda a, b: torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]  # noqa: E731
    assert min(r(a, b) for a, b in zip(shown, moved["weight"][:, :, 0])) > 0.97 > min(r(a, b) for a, b in zip(shown, blob))
    edges = [(one.view(h, w) == 1).sum(1).float().mean() for one in moved["owners"][::2]]  # where the second person's region begins
    assert all(set(one.unique().tolist()) == {1, 2} for one in moved["owners"]) and len(set(map(float, edges))) > 1
    centre = lambda z: ((z[:, 0, 0] * x).sum((1, 2)) / z[:, 0, 0].sum((1, 2)))[::2]  # noqa: E731
    assert r(torch.stack(edges), centre(moved["weight"])) > 0.6
    with pytest.raises(ValueError, match="linear code"):
        train_module.NewViews(VideoVAE(replace(vae.config, linear=False)))


@pytest.mark.parametrize("side", [1, 2])
def test_enlarged_stills_show_the_same_on_more_tokens(side):
    vae, g, (h, w) = VideoVAE.from_pretrained(data_samples("weights", "tiny", "vae")).eval(), torch.Generator().manual_seed(0), (8, 12)
    views, plain, grow = train_module.NewViews(vae, 1.5), train_module.NewViews(vae), torch.nn.functional.interpolate
    picture = grow(torch.rand(16, 3, 16, 24, generator=g), scale_factor=4, mode="bicubic").clamp(0, 1) * 1.6 - 0.8
    latents = plain.latents(picture)[:, :, None]
    owners = (1 + (torch.arange(w // side) >= w // side // 2)).to(torch.uint8).expand(16, 1, h // side, -1).flatten(2)
    weight = grow(torch.rand(16, 1, 4, 6, generator=g), (h, w), mode="bilinear")[:, :, None]
    batch = {"portrait": latents, "latents": latents, "weight": weight, "owners": owners}
    larger = views(batch, g, 0.0)
    assert larger["latents"].shape == larger["portrait"].shape == (16, 48, 1, 12, 18) and larger["weight"].shape == (16, 1, 1, 12, 18)
    want = grow(plain.pixels(latents[:, :, 0]), (96, 144), mode="bicubic", align_corners=False).clamp(-1, 1)
    torch.testing.assert_close(larger["latents"][:, :, 0], views.latents(want), atol=1e-3, rtol=1e-3)
    assert torch.equal(larger["owners"], grow(owners.view(16, 1, h // side, w // side).float(), (12 // side, 18 // side)).to(torch.uint8).flatten(2))
    torch.testing.assert_close(larger["weight"].mean(), weight.mean(), atol=0.02, rtol=0)
    moved = views(batch, g, 1.0)
    assert moved["latents"].shape == larger["latents"].shape and not torch.equal(moved["owners"], larger["owners"])
    assert all(set(one.unique().tolist()) == {1, 2} for one in moved["owners"])


def test_training_on_a_larger_grid_says_so_in_the_weights(tmp_path, capsys):
    arguments = ["--stage", "stills", "--batch", "2", "--threads", "1", "--cache", str(tmp_path / "cache")]
    assert main([*arguments, "--clips", "1", "--enlarge", "1.5", "--steps", "2", "--samples", "2", "--run", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    said = json.loads((tmp_path / "run/weights/pipeline.json").read_text())
    assert (said["enlarge"], said["face_only"], said["exposure"]) == (1.5, True, 0.4)
    drawn = cv2.imread(str(tmp_path / "run/samples/step-000002.png"))
    assert drawn.shape[:2] == (864, 648)  # as learned from; 576 rows as drawn
    on = [*arguments, "--clips", "1", "--steps", "3", "--samples", "0"]
    assert main([*on, "--init", str(tmp_path / "run/weights"), "--run", str(tmp_path / "on")]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "on/weights/pipeline.json").read_text())["enlarge"] == 1.5  # what the weights were taught is kept
    for value in ("0", "0.5", "nan"):  # refused before anything is drawn
        assert main(["--stage", "stills", "--clips", "1", "--enlarge", value, "--run", str(tmp_path / "other")]) == 2
        assert "want enlarge between 1 and 4" in capsys.readouterr().err and not (tmp_path / "other").exists()
    path = tmp_path / "run/checkpoint.pt"
    for stored, asked in ((1.5, "1.6"), (None, "1.5")):  # and a checkpoint that is older than the option
        state = torch.load(path, weights_only=True)
        state["config"].pop("enlarge")
        torch.save(state | {"config": state["config"] | ({"enlarge": stored} if stored else {})}, path)
        assert main([*on, "--enlarge", asked, "--resume", "--run", str(tmp_path / "run")]) == 2
        assert re.search("belongs to another run.*enlarge", capsys.readouterr().err)
    plain = ["--stage", "clips", "--clips", "1", "--batch", "1", "--steps", "1", "--threads", "1", "--samples", "0", "--run", str(tmp_path / "plain")]
    assert main([*plain, "--init", str(tmp_path / "run/weights")]) == 0 and "was taught with --enlarge 1.5" in capsys.readouterr().err
    assert json.loads((tmp_path / "plain/weights/pipeline.json").read_text())["enlarge"] == 1.0
    for stage in ("clips", "mixed"):
        assert main(["--stage", stage, "--clips", "1", "--enlarge", "1.5", "--run", str(tmp_path / "clips")]) == 2
        assert f"want a stage that learns from stills alone for --enlarge, got --stage {stage}" in capsys.readouterr().err
    assert main(["--stage", "small", "--enlarge", "1.5", "--run", str(tmp_path / "small")]) == 2 and "there are none of kind small" in capsys.readouterr().err
    assert main(["--enlarge", "1.5", "--run", str(tmp_path / "all")]) == 2 and "--enlarge belong to one stage" in capsys.readouterr().err
    config, clips = TrainConfig(steps=1, enlarge=1.5), LatentClips(tmp_path / "cache/stills")
    with pytest.raises(ValueError, match="want NewViews that enlarge stills 1.5 times, got None"):
        held_out_loss(small_animator(), clips, [0], config)
    views = [train_module.NewViews(VideoVAE.from_pretrained(data_samples("weights", "tiny", "vae")), n) for n in (1.5, 1.0)]
    losses = [held_out_loss(Animator.from_pretrained(data_samples("weights", "tiny")), clips, [0, 1], replace(config, enlarge=x.enlarge), views=x) for x in views]
    assert losses[0] != losses[1], losses
    with pytest.raises(ValueError, match="NewViews of the same, got 1.5, views=None"):
        train(small_animator(), None, TrainConfig(steps=1, enlarge=1.5))


def test_training_with_new_views_resumes_exactly(tmp_path, capsys):
    arguments = ["--stage", "stills", "--clips", "1", "--batch", "2", "--threads", "1", "--samples", "0", "--steps", "3", "--cache", str(tmp_path / "cache")]
    for name, minutes in (("whole", []), ("pieces", ["--max-minutes", "0"]), ("plain", [])):
        views = ["--new-views", "0.9", "--enlarge", "1.2"] if name != "plain" else []
        for _ in range(3 if minutes else 1):
            assert main([*arguments, *views, *minutes, "--run", str(tmp_path / name), "--resume"]) == 0, capsys.readouterr().err
    whole, pieces, plain = (Animator.from_pretrained(tmp_path / name / "weights").state_dict() for name in ("whole", "pieces", "plain"))
    assert all(torch.equal(whole[name], pieces[name]) for name in whole) and not all(torch.equal(whole[name], plain[name]) for name in whole)
    assert main([*arguments, "--new-views", "1.5", "--run", str(tmp_path / "other")]) == 2 and "want new_views between 0 and 1" in capsys.readouterr().err
    for decay in ("0", "1.5"):
        assert main([*arguments, "--decay", decay, "--run", str(tmp_path / "other")]) == 2 and "want decay above 0 and at most 1" in capsys.readouterr().err
    assert main([*arguments, "--first", "10", "--run", str(tmp_path / "nothing")]) == 2 and "want a multiple of 25 for --first, got 10" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(ValueError, match="NewViews if it is not 0"):
        train(small_animator(), None, TrainConfig(steps=1, new_views=0.5))


def test_further_scenes_of_one_person_are_numbered_on_and_learned_from(tmp_path, capsys, monkeypatch):
    learned, train = [], train_module.train
    monkeypatch.setattr(train_module, "train", lambda animator, clips, *rest, **named: learned.append(clips) or train(animator, clips, *rest, **named))
    arguments = ["--cache", str(tmp_path / "cache"), "--steps", "1", "--batch", "2", "--threads", "1", "--samples", "0"]
    assert main([*arguments, "--stage", "stills", "--first", "50", "--clips", "2", "--alone", "3", "--run", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    rows = load_file(tmp_path / "cache" / "stills-alone" / "clips-000075.safetensors")
    assert [path.name for path in (tmp_path / "cache" / "stills-alone").glob("clips-*")] == ["clips-000075.safetensors"] and len(learned[0]) == 2 * (2 + 3)
    assert [value.shape[0] for name, value in rows.items() if name.endswith(".features")] == [1] * 6  # and their mirror images
    asked, encoder = train_module.build_parser().parse_args(["--config", "mini", "--alone", "3"]), ExpressionEncoder(ExpressionConfig.tiny())
    for kind in ("small", "stills"):  # two stages of one run share their cache, and the pictures differ in size
        assert list(train_module.pictures_of(asked, (kind,), encoder)) == [kind, f"{kind}-alone"]
    assert main([*arguments, "--stage", "clips", "--clips", "1", "--alone", "3", "--run", str(tmp_path / "other")]) == 2
    assert "want a stage that learns from stills for --alone, got --stage clips" in capsys.readouterr().err and not (tmp_path / "cache" / "clips").exists()


def test_a_still_equals_a_window_whose_four_frames_agree():
    torch.manual_seed(0)
    animator = small_animator(2)
    for p in animator.dit.parameters():  # not the zeros of the start
        p.data.add_(0.05 * torch.randn_like(p))
    x, moment, owners, t = torch.randn(2, 100, 1, 4, 8), torch.randn(2, 2, 2, 554), torch.randint(0, 3, (2, 1, 32)), torch.tensor([1000.0, 400.0])
    with torch.no_grad():
        expression, mask = animator.listen(moment, owners, stills=True)
        fourfold = lambda z: z.unflatten(-1, (2, 24)).repeat_interleave(4, -2).flatten(-2)  # noqa: E731
        once = animator.dit(x, t, expression=expression, expression_mask=mask)
        four = animator.dit(x, t, expression=fourfold(expression.mT).mT, expression_mask=fourfold(mask))
        other = animator.dit(x, t, expression=animator.listen(moment.flip(1), owners, stills=True)[0], expression_mask=mask)
    torch.testing.assert_close(once, four, rtol=1e-4, atol=1e-5)
    assert (once - other).abs().max() > 1e-3


def test_a_mixed_cache_gives_batches_of_one_kind_each(cache, tmp_path):
    clip, tiny = SceneClips(stills_config(), seed=4)[0], data_samples("weights", "tiny")
    row = encode_stills(clip, VideoVAE.from_pretrained(tiny / "vae").eval(), ExpressionEncoder.from_pretrained(tiny / "encoder"))
    indices = [*range(12), *range(100, 112)]  # with a gap, as an interrupted or a grown cache has
    save_file({f"{i}.{name}": value.clone() for i in indices for name, value in row.items()}, tmp_path / "clips-000000.safetensors")
    alone, both = LatentClips(cache), LatentClips(tmp_path, cache)
    assert len(both) == len(alone) + 24
    assert all(torch.equal(both.clips[112 + i]["latents"], alone.clips[i]["latents"]) for i in alone.clips)
    kinds = [tuple(both.batch(2, step_generator(0, step))["latents"].shape[2:]) for step in range(40)]
    assert 24 <= kinds.count((4, 8, 12)) <= 36, kinds  # 24 of 32, as often as they are many: groups by turns would give 13


def test_stages_follow_one_another(tmp_path, capsys):
    first, second = tmp_path / "stills", tmp_path / "clips"
    assert main(["--stage", "stills", "--run", str(first), "--clips", "2", "--steps", "2", "--batch", "1"]) == 0
    assert main(["--stage", "clips", "--init", str(first / "weights"), "--run", str(second), "--clips", "2", "--steps", "2", "--batch", "1"]) == 0
    assert Animator.from_pretrained(second / "weights").dit.config.width == DiTConfig.tiny().width
    assert main(["--stage", "clips", "--init", str(tmp_path / "nowhere"), "--run", str(second), "--clips", "2"]) == 2 and "nowhere" in capsys.readouterr().err


def test_a_cache_says_what_it_is_made_of(tmp_path, capsys):
    runs = (str(tmp_path / f"run-{k}") for k in range(9))

    def begin(*more):  # another run, the same cache
        return main(["--stage", "stills", "--run", next(runs), "--cache", str(tmp_path / "cache"), "--steps", "1", "--batch", "1", "--threads", "1", "--samples", "0", *more])

    assert begin("--clips", "1") == 0
    stamp = tmp_path / "cache" / "stills" / "made-of.json"
    assert json.loads(stamp.read_text())["height"] == 64
    assert begin("--clips", "2", "--seed", "1") == 0  # more of the same
    stamp.write_text(stamp.read_text().replace('"encoder": "', '"encoder": "0'))
    for clips in ("2", "0"):
        assert begin("--clips", clips) == 2
        said = capsys.readouterr().err.splitlines()
        assert len([line for line in said if line.startswith("fantasy-train:")]) == 1 and "'encoder'" in said[-1] and "something else" in said[-1]
    stamp.unlink()
    assert begin("--clips", "2") == 2 and "made-of.json" in capsys.readouterr().err
    assert begin("--clips", "0") == 0  # whoever draws nothing takes what is there


def test_small_pictures_come_first_where_there_are_some(tmp_path, capsys, monkeypatch):
    assert main(["--stage", "small", "--run", str(tmp_path / "none")]) == 2 and "tiny" in capsys.readouterr().err
    monkeypatch.setattr(train_module, "run_stage", lambda args, stage, run, init, out: ran.append((stage, init, out)) or True)
    for config, want in (("tiny", ["stills", "clips", "mixed"]), ("mini", ["small", "stills", "clips", "mixed"])):
        ran = []
        assert main(["--config", config, "--run", str(tmp_path / config)]) == 0 and [stage for stage, *_ in ran] == want
        assert [init for _, init, _ in ran] == [None, *(out for *_, out in ran[:-1])]  # each goes on from the weights before


def test_mini_learns_from_small_pictures_and_animates(tmp_path):
    arguments = ["--config", "mini", "--stage", "small", "--bf16", "--run", str(tmp_path), "--clips", "1", "--steps", "1", "--batch", "1", "--samples", "0"]
    assert main(arguments) == 0
    weights, stamp = tmp_path / "weights", json.loads((tmp_path / "cache" / "small" / "made-of.json").read_text())
    assert (stamp["height"], stamp["crop"], stamp["seed"]) == (96, 128, 1)
    assert round(PortraitPipeline.from_pretrained(weights).settings.face_height) == 71  # as large as it has seen them


def test_all_stages_in_one_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_module, "PICTURES", {"tiny": {kind: (clips, encode, 2) for kind, (clips, encode, _) in train_module.PICTURES["tiny"].items()}})
    monkeypatch.setattr(train_module, "STAGES", {name: (kinds, replace(config, steps=2, batch=1)) for name, (kinds, config) in train_module.STAGES.items()})
    learned = []
    monkeypatch.setattr(train_module, "LatentClips", lambda *folders: learned.append([f.name for f in folders]) or LatentClips(*folders))
    assert main(["--run", str(tmp_path), "--max-minutes", "0"]) == 0 and "stopped within stills" in capsys.readouterr().out
    assert not (tmp_path / "clips").exists()
    assert main(["--run", str(tmp_path), "--resume"]) == 0
    said = capsys.readouterr().out
    assert all(f"{stage}: 2 of 2 steps" in said for stage in ("stills", "clips", "mixed"))
    assert learned == [["stills"], ["stills"], ["clips"], ["stills", "clips"]]  # the first was broken off
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["clips", "stills"] and not (tmp_path / "mixed" / "cache").exists()  # stages share their pictures
    first, last = (Animator.from_pretrained(tmp_path / folder).state_dict() for folder in ("stills/weights", "weights"))
    assert any(not torch.equal(a, b) for a, b in zip(first.values(), last.values()))
    assert main(["--run", str(tmp_path), "--steps", "3"]) == 2 and "--steps" in capsys.readouterr().err


def test_the_bench_takes_any_batch(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import bench_train

    monkeypatch.setattr(bench_train, "matmul_rate", lambda dtype, device: 1e9)
    monkeypatch.setattr(Animator, "tiny", classmethod(lambda cls: small_animator()))
    assert bench_train.measure(["--batch", "17", "--steps", "1"]) == 0 and "batch 17" in capsys.readouterr().out  # of sixteen clips


def test_an_animator_hears_a_new_encoder_as_it_heard_the_old_one(monkeypatch):
    "The old encoder's features are a linear function of the new one's here, so nothing may be lost."
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    from hear_anew import hear_anew

    torch.manual_seed(0)
    new = ExpressionEncoder(replace(ExpressionConfig.tiny(), width=16, depth=1, heatmaps=8, hidden=24)).eval()
    old, tokens = copy.deepcopy(new), ExpressionTokens(TokenConfig.tiny())
    with torch.no_grad():
        for name, width in FEATURE_WIDTHS.items():
            layer = last_layer(old, name)
            mixed = torch.randn(width, width) / width**0.5
            layer.weight.copy_(mixed @ layer.weight), layer.bias.copy_(mixed @ layer.bias)
            torch.nn.init.normal_(tokens.origin[name].weight)  # not the zeros of the start
        crops = render_crops(Identity.sample(8, seed=1), Expression.sample(8, seed=2), 96, closer=new.config.closer)
        listen = lambda encoder: tokens(encoder(crops), place=False, origin=encoder(crops[:1]).pack()[0])  # noqa: E731
        before, deaf = listen(old), listen(new)
        shares = hear_anew(tokens, new, old, count=120, ridge=1e-12)
        after = listen(new)
    assert min(shares.values()) > 0.99
    assert (after - before).square().mean() < 0.02 * (deaf - before).square().mean()
