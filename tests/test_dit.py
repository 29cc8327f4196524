"Chapter 06: the DiT against the released names, the reference numbers, diffusers, and itself."
import json
import subprocess
import sys
import zlib
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fantasy_nb.dit as dit_module
from fantasy_nb.dit import DiT, DiTConfig, apply_rope, as_diffusers, attend, diffusers_class, fill_text, pad_text, rope_3d, weight_of_fill
from fantasy_nb.regions import add_expression

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))
import bench_dit
from bench_dit import diffusers_twin

REFERENCE = ROOT.parent / "shared" / "reference"
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


@needs_reference
def test_the_bench_uses_the_checked_key_map():
    rows = [line.split("|") for line in (REFERENCE / "key_map.md").read_text().splitlines() if line.startswith("| `")]
    want = {row[1].strip(" `"): row[2].strip(" `") for row in rows}
    assert {name: bench_dit.diffusers_name(name) for name in want} == want


SHAPES = [(1, 1, 2, 2), (2, 3, 6, 4), (1, 2, 10, 14), (1, 5, 4, 2), (2, 1, 6, 10), (3, 4, 2, 18)]  # batch, latent frames, rows, columns
DTYPES = pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"])
MEMORIES = pytest.mark.parametrize("image_width", [None, 40], ids=["t2v", "i2v"])


def assert_twins(dit, twin, dtype, tolerance):
    "Our DiT and diffusers' answer alike on every shape, with prepared memories and without."
    for shape in SHAPES:
        x, t, text, image = (z.to(dtype) for z in inputs(dit.config, *shape))
        padded = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
        image = image if dit.config.image_width else None
        want = twin(x, t.float(), padded, image, return_dict=False)[0]
        y = dit(x, t.float(), text, image)
        assert y.dtype == dtype and relative(y.float(), want.float()) < tolerance, shape
        assert torch.equal(dit(x, t.float(), memories=dit.prepare(text=text, image=image)), y)


@torch.no_grad()
@MEMORIES
@DTYPES
@pytest.mark.parametrize("changes", [{}, dict(width=48, heads=3, ffn=80, layers=1)], ids=["two heads", "three heads"])
def test_equals_diffusers(image_width, dtype, tolerance, changes):
    dit = randomised(DiT(small(image_width=image_width, in_channels=36 if image_width else 16, **changes))).to(dtype)
    assert_twins(dit, diffusers_twin(dit), dtype, tolerance)


@torch.no_grad()
@MEMORIES
def test_equals_diffusers_with_its_float32_islands(tmp_path, image_width):
    "As from_pretrained in bfloat16 leaves it: diffusers keeps modulation, norms and the time embedding in float32."
    dit = randomised(DiT(small(image_width=image_width, in_channels=36 if image_width else 16)))
    twin = diffusers_twin(dit)
    dit.to(torch.bfloat16)
    for name, module in twin.named_modules():
        if not any(kept in name for kept in twin._keep_in_fp32_modules):
            for p in module.parameters(recurse=False):
                p.data = p.data if p is getattr(module, "scale_shift_table", None) else p.data.to(torch.bfloat16)
    assert {p.dtype for p in twin.parameters()} == {torch.float32, torch.bfloat16}
    assert_twins(dit, twin, torch.bfloat16, 2e-2)


@torch.no_grad()
def test_bfloat16_is_as_near_float32_as_diffusers():
    dit = randomised(DiT(small()))
    x, t, text, image = inputs(dit.config)
    want = dit(x, t, text, image)
    x, text, image = (z.to(torch.bfloat16) for z in (x, text, image))
    twin = diffusers_twin(dit.to(torch.bfloat16))
    theirs = twin(x, t, torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1])), image, return_dict=False)[0]
    assert relative(dit(x, t, text, image).float(), want) < 1.2 * relative(theirs.float(), want) < 0.1


def test_bench_runs_and_agrees():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "bench_dit.py", "--cpu", "--steps", "1", "--repeats", "1", "--sizes", "1x4x4", "--threads", "1"],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 tokens" in done.stdout and "ratio" in done.stdout and "MiB at the peak" in done.stdout


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


@pytest.mark.parametrize("masked", [False, True])
def test_stored_weights_are_the_same_attention(masked, monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 4, 16, generator=g).requires_grad_() for n in (40, 9, 9))
    bias = torch.where(torch.rand(2, 1, 40, 9, generator=g) < 0.5, -torch.inf, torch.randn(2, 1, 40, 9, generator=g)).index_fill(3, torch.tensor([3]), 0.0) if masked else None
    answers, library, calls = [], torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args: calls.append(1) or library(*args))
    for limit in (0, 1 << 18):
        monkeypatch.setattr(dit_module, "STORED_WEIGHTS", limit)
        out = attend(q, k, v, bias)
        answers.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert len(calls) == 1  # the second time the weights were stored
    for fused, stored in zip(*answers):
        torch.testing.assert_close(fused, stored, rtol=1e-5, atol=1e-5)


def test_checkpointing_gives_the_same_gradients(monkeypatch):
    dit = randomised(DiT(small()))
    args = inputs(dit.config)
    gradients, calls, library = [], [], dit_module.checkpoint
    monkeypatch.setattr(dit_module, "checkpoint", lambda *a, **k: calls.append(1) or library(*a, **k))
    for dit.gradient_checkpointing in (False, True):
        dit.zero_grad()
        dit(*args).square().mean().backward()
        gradients.append([p.grad.clone() for p in dit.parameters()])
    assert len(calls) == 2  # both blocks, the second time only
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


def host(folder, **options):
    "diffusers' own from_pretrained, without accelerate."
    return diffusers_class(add_expression).from_pretrained(folder, low_cpu_mem_usage=False, **options)


@pytest.fixture
def listening():
    "A DiT with all three memories, and inputs for it."
    dit = randomised(add_expression(DiT(small()), 8))
    x, t, text, image = inputs(dit.config)
    return dit, dict(x=x, t=t, text=text, image=image, expression=torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(2)))


@torch.no_grad()
def test_shards_written_by_diffusers_read_by_both(listening, tmp_path):
    dit, given = listening
    want = dit(**given)
    as_diffusers(dit).save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = {p.name for p in tmp_path.glob("*.safetensors")}
    assert len(files) > 2 and set(index["weight_map"].values()) == files and index["weight_map"].keys() == dit.state_dict().keys()
    assert torch.equal(host(tmp_path)(**given), want)
    again = DiT.from_pretrained(tmp_path, add_expression)
    assert again.config == dit.config and torch.equal(again(**given), want)
    with pytest.raises(ValueError, match="expression memory"):
        diffusers_class().from_pretrained(tmp_path, low_cpu_mem_usage=False)
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(FileNotFoundError, match="00002-of"):
        DiT.from_pretrained(tmp_path, add_expression)


@torch.no_grad()
def test_one_file_written_by_us_read_by_diffusers(listening, tmp_path):
    dit, given = listening
    as_diffusers(dit).save_pretrained(tmp_path, max_shard_size="100KB")
    randomised(dit, seed=1).save_pretrained(tmp_path)  # in place of the shards
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    hosted = host(tmp_path, torch_dtype=torch.float32)
    assert torch.equal(hosted(**given), dit(**given)) and hosted.config.expression_width == 8
    assert host(tmp_path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


@torch.no_grad()
def test_in_diffusers_hands_it_is_the_same_model(listening):
    from diffusers import ConfigMixin, ModelMixin

    dit, given = listening
    hosted = as_diffusers(dit)
    assert isinstance(hosted, ModelMixin) and isinstance(hosted, ConfigMixin) and isinstance(hosted, DiT) and not isinstance(dit, ModelMixin)
    assert hosted.config.width == 64 and hosted.config["expression_width"] == 8 and not hosted.training and as_diffusers(hosted) is hosted
    assert torch.equal(hosted(**given), dit(**given))
    assert hosted.release_state_dict().keys() == dit.release_state_dict().keys()
    hosted.enable_gradient_checkpointing()
    assert hosted.gradient_checkpointing and hosted.is_gradient_checkpointing
    dit.head.head.bias += 1  # one set of weights
    assert torch.equal(hosted(**given), dit(**given))


@torch.no_grad()
def test_layerwise_casting(listening):
    dit, given = listening
    hosted = as_diffusers(deepcopy(dit))
    before = hosted.get_memory_footprint()
    hosted.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    narrow = {name for name, p in hosted.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert "blocks.0.ffn.0.weight" in narrow and "blocks.1.cross_attention.memories.expression.key.weight" in narrow
    assert not any(word in name for name in narrow for word in ("norm", "modulation", "embedding", "patchify"))
    y = hosted(**given)
    assert y.isfinite().all() and 0 < relative(y, dit(**given)) < 0.1 and hosted.get_memory_footprint() < before
    assert torch.equal(hosted(given["x"], given["t"], memories=hosted.prepare(given["text"], given["image"], given["expression"])), y)
    assert hosted(given["x"], given["t"]).isfinite().all()  # nobody speaks: out's bias alone, stored narrow
    assert {p.dtype for p in hosted.blocks[0].ffn.parameters()} == {torch.float8_e4m3fn}  # back to sleep


@torch.no_grad()
def test_group_offloading_to_disk(listening, tmp_path):
    pytest.importorskip("accelerate")  # diffusers' hooks want it
    dit, given = listening
    hosted = as_diffusers(deepcopy(dit))
    with pytest.raises(ValueError, match="leaf_level"):
        hosted.enable_group_offload("cpu", offload_type="block_level", num_blocks_per_group=1)
    hosted.enable_group_offload("cpu", offload_to_disk_path=str(tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) > 20
    assert torch.equal(hosted(**given), dit(**given))
    memories = hosted.prepare(given["text"], given["image"], given["expression"])
    assert torch.equal(hosted(given["x"], given["t"], memories=memories), dit(**given))
    assert torch.equal(hosted(given["x"], given["t"]), dit(given["x"], given["t"]))  # nobody speaks: the output layer is fetched all the same


def test_the_bridge_is_built_only_when_asked_for():
    code = "import sys, fantasy_nb.dit, fantasy_nb.regions; print('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


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


@torch.no_grad()
@pytest.mark.parametrize("words", [1, 9, 511, 512])
def test_one_filled_place_stands_for_all(words):
    "Attention over few keys and a weight equals attention over the full 512; without the weight it does not."
    dit = randomised(DiT(small()))
    text = torch.randn(2, words, dit.config.text_width, generator=torch.Generator().manual_seed(words))
    memory = dit.blocks[0].cross_attention.memories["text"]
    few, every = (memory.keys_values(dit.text_embedding(fill(text, 512))) for fill in (fill_text, pad_text))
    assert few[0].shape[1] == min(words + 1, 512) and every[0].shape[1] == 512
    query = 3 * torch.randn(2, 5, *few[0].shape[2:], generator=torch.Generator().manual_seed(0))
    want = attend(query, *every)
    assert relative(attend(query, *few, weight_of_fill(few[0], 512)), want) < 1e-5
    if words < 511:
        assert relative(attend(query, *few), want) > 1e-3  # without the weight it is another answer


def test_forward_refuses_what_it_would_ignore():
    dit = DiT(DiTConfig(8, 4, width=32, ffn=48, heads=2, layers=2, text_width=16, image_width=None)).eval()
    x, t, words = torch.randn(1, 8, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 16)
    memories = dit.prepare(text=words)
    with pytest.raises(ValueError, match="got both"):
        dit(x, t, text=words, memories=memories)
    with pytest.raises(ValueError, match="expression_mask, got none"):
        dit(x, t, text=words, expression_mask=torch.ones(1, 1, 4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="shorter|longer"):  # zip's own words
        dit(x, t, memories=memories[:1])
    with pytest.raises(ValueError, match=r"want text tokens of width 16, got \(1, 3, 15\)"):
        dit(x, t, text=words[..., :15])


def test_a_folder_of_wan_itself_is_refused_in_one_line(tmp_path):
    dit = DiT(DiTConfig(8, 4, width=32, ffn=48, heads=2, layers=1, text_width=None, image_width=None))
    dit.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"width"', '"attention_head_dim"'))
    with pytest.raises(ValueError, match="not saved by a DiT of ours: its config has attention_head_dim"):
        DiT.from_pretrained(tmp_path)


def test_rope_is_the_same_where_it_is_compiled():
    x, rope = torch.randn(2, 24, 3, 12), rope_3d((2, 3, 4), 12)
    compiled = torch.compile(apply_rope, backend="eager", fullgraph=True)  # traced as the compiler would, run without it
    torch.testing.assert_close(compiled(x, rope), apply_rope(x, rope))
    assert compiled(x.bfloat16(), rope).dtype == torch.bfloat16
