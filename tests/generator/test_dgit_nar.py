import copy

import pytest
import torch
from helpers_generators import CLASSED, MODERN, WIDTH, labels_for, make_nar, same, untrained
from strategies import LAYOUTS, random_codes, random_grains

from graincode.core.codes import GrainCodes
from graincode.core.errors import GraincodeError
from graincode.core.layout import CodeLayout
from graincode.core.losses import weighted_sum
from graincode.core.prompts import CodeMask, CodePrefix
from graincode.core.rng import SampleRng
from graincode.core.sequences import to_sequences
from graincode.generator import (
    ClassConditioning,
    DGiTAR,
    DGiTNAR,
    HeterogeneousEmbedding,
    InformationMasking,
    MaskedObjective,
    NoConditioning,
    Transformer,
    dgit_nar,
)
from graincode.generator.dgit_nar import ConditionedLogits
from graincode.sampling import AutoregressiveSampler, AutoSampler, MaskedSampler

ORDERS = ("confidence", "random", "halton", "coarse_first", "dense_first")


VARIANTS = {
    "plain": {},
    "modern": {"block": MODERN},
    "rotary alone": {"block": {"rotary": True}, "parts": {"position": "none"}},
    "shared positions": {"parts": {"position": "shared", "grain": False}},
    "no conditioning": {"block": MODERN | {"adaln": False}, "conditioning": NoConditioning},
}


def everywhere(ask, slots, contents):
    """(B, L, V) logits of all places."""
    logits = ask.contents(slots, contents, torch.arange(slots.numel()))
    return logits(torch.arange(slots.numel())).unflatten(0, slots.shape)


def test_with_one_grain_the_content_transformer_sees_everything():
    """The masked model at K = 1, written anew."""
    layout = CodeLayout((16, 24), ((4, 4),), 16, 3)
    model, codes = make_nar(layout), random_codes(layout, random_grains(layout, 5))
    labels, contents = labels_for(layout, 5), codes.indices.flatten(1)
    masked = torch.rand(contents.shape) < 0.5
    embedding, x = model.embedding, model.embedding.content(contents.masked_fill(masked, layout.codebook_size))
    x = x + embedding.position.weight[: x.shape[1]] + embedding.grain.weight[0]
    x = x + model.conditioning.table(labels)[:, None]
    x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    for block in model.content_transformer.blocks:
        parts = block.attention.qkv(block.norm1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(2, (4, -1)) for part in parts)
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + block.attention.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
        x = x + block.mlp[2](torch.nn.functional.gelu(block.mlp[0](block.norm2(x))))
    expected = model.content_transformer.norm(x) @ model.content_head.weight.T + model.content_head.bias
    ask = ConditionedLogits(model, model.conditioning(labels))
    hidden = contents.masked_fill(masked, layout.no_content)
    logits = everywhere(ask, to_sequences(codes, ends=False).slots, hidden)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", CLASSED, ids=str)
def test_logits_depend_on_neither_batch_mates_nor_padding_and_follow_a_permutation(layout, variant):
    model, codes = make_nar(layout, **VARIANTS[variant]), random_codes(layout, random_grains(layout, 4))
    ask = ConditionedLogits(model, model.conditioning(labels_for(layout, 4)))
    tokens = to_sequences(codes, ends=False)
    masked = tokens.is_code & (torch.rand(tokens.slots.shape) < 0.4)
    contents = tokens.contents.masked_fill(masked, layout.no_content)
    together = everywhere(ask, tokens.slots, contents)
    asked = ask.contents(tokens.slots, contents, masked.flatten().nonzero()[:, 0])
    rows = torch.randperm(int(masked.sum()))[:5]
    torch.testing.assert_close(asked(rows), together[masked][rows])
    for row, length in enumerate(codes.lengths.tolist()):
        one = ConditionedLogits(model, model.conditioning(labels_for(layout, 4)[[row]]))
        alone = everywhere(one, tokens.slots[[row], :length], contents[[row], :length])
        torch.testing.assert_close(alone[0], together[row, :length])
    order = torch.randperm(tokens.slots.shape[1])
    torch.testing.assert_close(everywhere(ask, tokens.slots[:, order], contents[:, order]), together[:, order])
    other = contents.clone()
    other[:, -1] = torch.where(
        tokens.is_code[:, -1] & ~masked[:, -1], (other[:, -1] + 1) % layout.codebook_size, other[:, -1]
    )
    changed = (everywhere(ask, tokens.slots, other) - together).abs().amax(dim=2)[:, 0] > 0
    assert torch.equal(changed, (other != contents).any(dim=1))  # the first code sees the last


@pytest.mark.parametrize(
    ("layout", "order"),
    [(layout, order) for layout in CLASSED for order in (ORDERS if layout.num_grains > 1 else ORDERS[:3])],
    ids=str,
)
def test_a_sample_depends_on_its_seed_index_and_label_alone(layout, order):
    model, labels = make_nar(layout), labels_for(layout, 7)
    settings = {"order": order, "steps": 4}
    if layout.num_grains > 1:
        settings["grain_steps"] = 3
    everything = model.sample(labels, seed=5, batch_size=7, **settings)
    for batch_size in (1, 3):
        assert same(model.sample(labels, seed=5, batch_size=batch_size, **settings), everything)
    alone = model.sample(labels[6:], seed=5, first_index=6, batch_size=2, **settings)
    assert same(alone, everything[[6]])
    assert not same(model.sample(labels, seed=6, batch_size=7, **settings), everything)


def test_samples_of_independent_codes_follow_the_model():
    """With one code per step every sample comes from the model's own chain of conditionals; here, of two codes."""
    layout = CodeLayout((2, 4), ((2, 2),), 3, 1)
    model = make_nar(layout)
    slots, label = torch.arange(2)[None], torch.zeros(1, dtype=torch.long)
    ask = ConditionedLogits(model, model.conditioning(label))
    mask = layout.no_content
    both = everywhere(ask, slots, torch.tensor([[mask, mask]])).softmax(-1)[0]
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for first, second in ((0, 1), (1, 0)):  # in random order, either comes first half of the time
        for value in range(3):
            known = torch.full((1, 2), mask)
            known[0, first] = value
            joint = 0.5 * both[first, value] * everywhere(ask, slots, known).softmax(-1)[0, second]
            expected[(value, slice(None)) if first == 0 else (slice(None), value)] += joint
    drawn = model.sample(label.repeat(4000), batch_size=1000, steps=2, order="random", mask_schedule="linear")
    counts = torch.bincount(drawn.indices.flatten(1) @ torch.tensor([3, 1]), minlength=9) / 4000
    spread = (expected.flatten() * (1 - expected.flatten()) / 4000).sqrt()
    assert float(((counts - expected.flatten()).abs() / spread.clamp(min=1e-3)).max()) < 4.5


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[5]], ids=["one grain", "three grains"])
def test_on_a_gpu_what_is_not_masked_is_predicted_too_and_does_not_count(layout, monkeypatch):
    model = make_nar(layout, masking=InformationMasking()).requires_grad_(True).train()
    codes, rng = random_codes(layout, random_grains(layout, 5)), SampleRng(3, torch.arange(5))
    found = []
    for anywhere in (False, True):
        if anywhere:
            monkeypatch.setattr(dgit_nar, "_predicted", lambda masked: slice(None))
        terms = MaskedObjective()(model(codes, labels_for(layout, 5), rng))
        loss = weighted_sum(terms)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found.append([*(torch.as_tensor(term.mean).double() for term in terms.values()), loss, *gradients])
    for few, every in zip(*found, strict=True):
        torch.testing.assert_close(few, every)


def test_sampling_modulates_the_blocks_once():
    model, asked = make_nar(LAYOUTS[2], block=MODERN), []
    for stack in (model.grain_transformer, model.content_transformer):
        stack.modulation.register_forward_hook(lambda module, *_: asked.append(module))
    model.sample(labels_for(LAYOUTS[2], 3), batch_size=3, guidance_scale=2.0)
    assert asked == [model.grain_transformer.modulation, model.content_transformer.modulation]


def test_beginnings_of_sequences_are_kept_as_dgit_ar_keeps_them():
    layout = LAYOUTS[5]
    model, labels = make_nar(layout), labels_for(layout, 6)
    codes = random_codes(layout, random_grains(layout, 6))
    for count in range(layout.num_grains + 1):
        found = model.sample(labels, batch_size=4, given=CodePrefix.of_grains(codes, count))
        coarse = codes.grains < count
        assert torch.equal(found.grains < count, coarse)  # no other region becomes as coarse
        assert torch.equal(found.grains[coarse], codes.grains[coarse])
        cells = layout.expand(coarse, 0)
        assert torch.equal(found.indices[cells], codes.indices[cells])
    assert same(found, codes)
    found = model.sample(labels, batch_size=4, given=CodePrefix.of_map(codes))
    assert torch.equal(found.grains, codes.grains)
    assert not torch.equal(found.indices, codes.indices)
    prefix = CodePrefix.of_regions(codes, 2)
    found = model.sample(labels, batch_size=4, given=prefix)
    assert torch.equal(found.indices[prefix.known_cells], codes.indices[prefix.known_cells])
    assert CodeMask.of_prefix(prefix).known_regions.flatten(1).sum(dim=1).tolist() == [2] * 6


def test_an_autoregressive_generator_refuses_what_has_no_order():
    layout = LAYOUTS[2]
    model = DGiTAR(
        layout, WIDTH, HeterogeneousEmbedding(layout, WIDTH), ClassConditioning(layout, WIDTH),
        Transformer(WIDTH, 1, 4), Transformer(WIDTH, 1, 4),
    )  # fmt: skip
    codes = random_codes(layout, random_grains(layout, 2))
    with pytest.raises(GraincodeError, match=r"fixed order"):
        model.sample(labels_for(layout, 2), given=CodeMask.of_regions(codes, torch.ones(4, 4).bool()))
    with pytest.raises(GraincodeError, match=r"^sampler=masked: expected auto or autoregressive"):
        model.resolve(MaskedSampler())
    with pytest.raises(GraincodeError, match=r"^sampler=autoregressive: expected auto or masked"):
        make_nar(layout).resolve(AutoregressiveSampler())
    shared = {"temperature": 0.5, "top_k": 3, "guidance_scale": 2.0}
    assert model.resolve(AutoSampler(**shared)) == AutoregressiveSampler(**shared)
    assert make_nar(layout).resolve(AutoSampler(**shared)) == MaskedSampler(**shared)
    with pytest.raises(GraincodeError, match=r"^region_top_k=1: expected"):
        make_nar(layout).sample(labels_for(layout, 2), region_top_k=1)


def test_settings_by_density_are_refused_where_all_codes_have_the_same():
    layout = LAYOUTS[1]
    model, labels = make_nar(layout), labels_for(layout, 2)
    for name, value in (
        ("information_weight", -2.0), ("order", "dense_first"), ("order", "coarse_first"), ("grain_steps", 3),
        ("grain_temperature", 0.5), ("grain_choice_temperature", 0.0),
    ):  # fmt: skip
        with pytest.raises(GraincodeError, match=rf"^{name}={value}: expected .*one grain"):
            model.resolve(MaskedSampler(**{name: value}))
        with pytest.raises(GraincodeError, match=rf"^{name}={value}: expected .*one grain"):
            model.sample(labels, **{name: value})
    for masking in (InformationMasking(beta=-1.0), InformationMasking(beta=2.0, elastic=True)):
        with pytest.raises(GraincodeError, match=rf"^beta={masking.beta}: expected 0"):
            make_nar(layout, masking=masking)


@pytest.mark.slow
def test_samples_of_a_trained_model_are_like_what_it_was_trained_on():
    """Every row has one fine region, and all codes follow from any one of them and the class."""
    layout = CodeLayout((16, 16), ((8, 8), (4, 4)), 4, 2)
    model = untrained(layout)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(300):
        first, labels, value = torch.randint(2, (32, 2, 1)), torch.randint(2, (32,)), torch.randint(4, (32, 1, 1))
        grains = torch.cat([first, 1 - first], dim=2)
        fine = (value + 1 + labels[:, None, None]) % 4
        indices = torch.where(layout.expand(grains, 0) == 1, fine, value)
        rng = SampleRng(0, torch.arange(32) + 32 * step)
        loss = weighted_sum(MaskedObjective()(model(GrainCodes(grains, indices, layout), labels, rng)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels = torch.arange(200) % 2
    codes = model.eval().sample(labels, batch_size=200, order="dense_first", grain_steps=4)
    assert float((codes.grains.sum(dim=2) == 1).all(dim=1).double().mean()) > 0.9
    fine = layout.expand(codes.grains, 0) == 1
    values = torch.where(fine, codes.indices - 1 - labels[:, None, None], codes.indices).flatten(1) % 4
    assert float((values == values[:, :1]).all(dim=1).double().mean()) > 0.7
    assert len(values[:, 0].unique()) == 4


def test_parts_that_do_not_fit_together_are_refused():
    layout = LAYOUTS[2]
    embedding = HeterogeneousEmbedding(layout, WIDTH, index=False)
    free, causal = Transformer(WIDTH, 1, 4, causal=False), Transformer(WIDTH, 1, 4)
    conditioning = NoConditioning(layout, WIDTH)
    for stacks in ((causal, free), (free, causal)):
        with pytest.raises(GraincodeError, match=r"^causal=True: expected false"):
            DGiTNAR(layout, WIDTH, embedding, conditioning, *stacks)
    with pytest.raises(GraincodeError, match=r"^index=True: expected false"):
        DGiTNAR(layout, WIDTH, HeterogeneousEmbedding(layout, WIDTH), conditioning, free, free)
    with pytest.raises(GraincodeError, match=r"^position=none: expected"):
        make_nar(layout, parts={"position": "none"})
    with pytest.raises(GraincodeError, match=r"^adaln=True: expected false"):
        make_nar(layout, NoConditioning, block=MODERN)
    with pytest.raises(GraincodeError, match=r"^position_layers=0: expected 1"):
        DGiTNAR(layout, WIDTH, embedding, conditioning, Transformer(WIDTH, 0, 4, causal=False), free)
    with pytest.raises(GraincodeError, match=r"^grains_weight=-1\.0: expected"):
        MaskedObjective(-1.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_are_drawn_in_half_precision_too(variant):
    layout, steps = LAYOUTS[2], []
    model, labels = make_nar(layout, dtype=torch.bfloat16, **VARIANTS[variant]), labels_for(layout, 4)
    tokens = to_sequences(random_codes(layout, random_grains(layout, 4)), ends=False)
    contents = tokens.contents.masked_fill(torch.rand(tokens.slots.shape) < 0.5, layout.no_content)
    values = torch.randint(layout.num_grains + 1, (4, layout.num_regions))
    found = []
    for one in (model, copy.deepcopy(model).float()):
        ask = ConditionedLogits(one, one.conditioning(labels))
        logits = everywhere(ask, tokens.slots, contents)[tokens.is_code], ask.grains(values)
        assert [part.dtype for part in logits] == [torch.float32, torch.float32]
        found.append([part.float() for part in logits])
    for half, full in zip(*found, strict=True):
        assert float((half - full).square().mean().sqrt() / full.std()) < 0.02
    for scale in (1.0, 2.0) if model.classes else (1.0,):
        assert (
            len(
                model.sample(
                    labels, batch_size=4, guidance_scale=scale, steps=3, on_step=lambda step, _: steps.append(step)
                )
            )
            == 4
        )
    assert steps[:3] == [1, 2, 3]
