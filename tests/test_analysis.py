"""Test the measures of Section 4 against reference values, computations by hand and brute force."""
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sec4_analysis import attention, cka, fig3_fourier, fig5_attention, fourier, similarity
from tests.helpers import assert_close, golden
from tests.straightforward_vit import everything, tiny

ROOT = Path(__file__).resolve().parents[1]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Layer similarity

def grams(layers):
    return torch.stack([cka.centred_gram(layer) for layer in layers])


def full_cka(x, y):
    """Compute the CKA of two layers on a single batch."""
    return cka.minibatch_cka([(grams([x]), grams([y]))])


def hsic_by_definition(x, y):
    """Compute HSIC1 as in the first equation of cka.py, in float64, with trace and sums spelt out."""
    K, L = (f.flatten(1).double() @ f.flatten(1).double().T for f in (x, y))
    n, one = len(K), torch.ones(len(K), dtype=torch.float64)
    K, L = K - torch.diag(K.diag()), L - torch.diag(L.diag())
    terms = torch.trace(K @ L) + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2)) \
        - 2 / (n - 2) * (one @ K @ L @ one)
    return (terms / (n * (n - 3))).item()


def test_cka_reference():
    values = golden("cka")
    x, y = (torch.from_numpy(values[name]).transpose(0, 1) for name in ("features1", "features2"))  # batches first
    assert_close(cka.minibatch_cka((grams(a), grams(b)) for a, b in zip(x, y)), values["cka"], 1e-4)


@pytest.mark.parametrize("n", [4, 5, 30])
def test_hsic_is_its_definition(n):
    x, y = noise(n, 3, 4) + 5, noise(n, 7, seed=1)
    assert_close(cka.hsic(grams([x]), grams([y])), [[hsic_by_definition(x, y)]], 1e-4)


def test_a_large_common_mean_costs_no_digits():
    x, y = noise(20, 50), noise(20, 40, seed=1)
    assert_close(full_cka(x + 1000, y), full_cka(x, y), 1e-3)


def test_cka_is_one_with_itself_and_blind_to_rotation_and_scale_but_not_to_other_maps():
    x, y = noise(40, 12), noise(40, 12, seed=1) + noise(40, 12)
    rotation = torch.linalg.qr(noise(12, 12, seed=2)).Q
    assert_close(full_cka(x, x), [[1.0]], 1e-6)
    assert_close(full_cka(x @ rotation * 7.5, y), full_cka(x, y), 1e-5)
    stretched = full_cka(x * torch.linspace(0.1, 10, 12), y)
    assert (stretched - full_cka(x, y)).abs() > 0.05
    assert full_cka(x, noise(40, 9, seed=3)).abs() < 0.2  # independent: unbiased, so around 0


def test_minibatches_of_all_kinds_average_to_the_full_batch():
    """HSIC1 is a U-statistic: its mean over all 21 choices of 5 images out of 7 equals that of the 7 images."""
    x, y = noise(7, 6), noise(7, 6) + noise(7, 6, seed=1)
    choices = [list(choice) for choice in itertools.combinations(range(7), 5)]
    streamed = cka.minibatch_cka((grams([x[c]]), grams([y[c]])) for c in choices)
    assert_close(streamed, full_cka(x, y), 1e-5)


def test_more_minibatches_come_closer_to_the_full_batch():
    x = noise(1024, 8)
    y = x @ noise(8, 8, seed=1) + noise(1024, 8, seed=2)
    full = full_cka(x, y)
    errors = [(cka.minibatch_cka((grams([a]), grams([b])) for a, b in zip(x[:count].split(16), y[:count].split(16)))
               - full).abs().item() for count in (64, 1024)]
    assert errors[1] < 0.02 and errors[1] < errors[0]


def test_unequal_batches_count_by_their_images():
    parts = [(noise(12, 5), noise(12, 5) + noise(12, 5, seed=1)), (noise(4, 5, seed=2), noise(4, 5, seed=3))]

    def mean(a, b):
        return sum(len(part[a]) * hsic_by_definition(part[a], part[b]) for part in parts) / 16
    expected = mean(0, 1) / math.sqrt(mean(0, 0) * mean(1, 1))
    assert_close(cka.minibatch_cka((grams([x]), grams([y])) for x, y in parts), [[expected]], 1e-5)


def test_cka_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match="at least 4 images at once, not 3: choose a larger --batch-size"):
        cka.centred_gram(noise(3, 5))
    with pytest.raises(ValueError, match="same features"):
        full_cka(torch.ones(8, 5), noise(8, 5))


# Attention

def test_attention_reference():
    values = golden("attention")
    distances = attention.patch_distances((int(values["grid"]),) * 2, (1, 1))
    entropy, distance = [], []
    for batches in torch.from_numpy(values["logits"]):  # of one layer
        weights = attention.attention_weights(batches.flatten(0, 1))  # batches are of equal size
        lowered = (weights * (1 + 1e-6 / weights).log()).sum(dim=-1).mean(dim=-1)  # by their 1e-6 in the logarithm
        entropy.append((attention.attention_entropy(weights) - lowered).mean(dim=0))
        distance.append(attention.attention_distance(weights, distances).mean(dim=0))
    assert_close(torch.stack(entropy), values["entropy"], 1e-5)
    assert_close(torch.stack(distance), values["distance_in_patches"], 1e-5)


@pytest.mark.parametrize(("unit", "pixels"), [((16, 16), 116.49), (attention.AUTHORS_PATCH_SIZE, 101.93)])
def test_uniform_attention_on_14_x_14(unit, pixels):
    weights = attention.attention_weights(torch.zeros(1, 2, 197, 197))
    distances = attention.patch_distances((14, 14), unit)
    assert attention.attention_distance(weights, distances)[0].tolist() == pytest.approx([pixels] * 2, abs=0.005)
    assert attention.attention_entropy(weights)[0].tolist() == pytest.approx([math.log(196)] * 2, rel=1e-5)
    assert distances.max().item() == pytest.approx(13 * math.sqrt(2) * unit[0])


def test_one_hot_attention_is_exact_on_a_grid_that_is_not_square():
    """2 x 3 patches of 4 x 8 px, one prefix token; query q looks at key (q + 2) % 6 alone."""
    logits = torch.full((1, 1, 7, 7), -1e9)
    hops = []
    for query in range(6):
        key = (query + 2) % 6
        logits[0, 0, 1 + query, 1 + key] = 0
        hops.append(math.hypot(4 * (query // 3 - key // 3), 8 * (query % 3 - key % 3)))
    weights = attention.attention_weights(logits)
    distances = attention.patch_distances((2, 3), (4, 8))
    assert_close(attention.attention_distance(weights, distances), [[np.mean(hops)]], 1e-6)
    assert attention.attention_entropy(weights).item() == 0


def test_cutting_the_class_token_is_scaling_the_rest_and_keeping_it_is_not():
    logits, distances = noise(2, 3, 11, 11), attention.patch_distances((3, 3), (2, 2))  # two prefix tokens
    full = logits.softmax(dim=-1)[:, :, 2:]
    cut, kept = (attention.attention_weights(logits, 2, keep) for keep in (False, True))
    assert_close(cut, full[..., 2:] / full[..., 2:].sum(dim=-1, keepdim=True), 1e-6)
    assert_close(kept, full, 1e-6)
    by_hand = sum(full[:, :, q, 2 + k] * math.dist(divmod(q, 3), divmod(k, 3)) * 2 for q in range(9) for k in range(9))
    assert_close(attention.attention_distance(kept, distances), by_hand / 9, 1e-5)
    assert_close(attention.attention_entropy(kept), -(full * full.log()).sum(dim=-1).mean(dim=-1), 1e-5)


# Fourier

def delta_of(tokens, grid):
    """Compute the delta log amplitude of tokens (B, L, C), mean over images."""
    return fourier.delta_log_amplitude(fourier.log_amplitude(tokens, grid).double().mean(dim=0))


def test_fourier_reference():
    values = golden("fourier")
    ours = torch.stack([delta_of(torch.from_numpy(layer), (8, 8)) for layer in values["latents"]])
    assert_close(ours, values["delta_log_amplitude"], 1e-5)


def test_a_constant_has_no_high_frequency():
    delta = delta_of(torch.full((2, 196, 3), 2.0), (14, 14))
    assert delta.tolist() == pytest.approx([0] + [math.log(1e-6) - math.log(2 * 196)] * 6, rel=1e-5)


def test_the_last_point_is_below_the_checkerboards_frequency():
    """A checkerboard of +1 and -1 has all its amplitude at pi, which the half diagonal does not reach, and mean 0."""
    board = torch.tensor([(-1.0) ** (i + j) for i in range(14) for j in range(14)]).view(1, 196, 1)
    assert delta_of(board, (14, 14)).abs().max() < 1e-6
    assert fourier.diagonal_frequencies((14, 14)) == pytest.approx([0, 1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7])
    assert fourier.diagonal_frequencies((9, 9))[-1] == pytest.approx(8 / 9)
    assert fourier.diagonal_frequencies((4, 6))[-1] == 0.5


def test_a_wave_along_the_diagonal_is_where_it_should_be():
    """1 + cos(2 pi 5 (r + c) / 14) has amplitude 196 at frequency 0 and 98 at i = 5."""
    wave = torch.tensor([1 + math.cos(2 * math.pi * 5 * (r + c) / 14) for r in range(14) for c in range(14)])
    delta = delta_of(wave.view(1, 196, 1), (14, 14))
    assert delta[5].item() == pytest.approx(math.log(98 / 196), abs=1e-4)
    assert all(delta[i] < -10 for i in (1, 2, 3, 4, 6))


def test_white_noise_is_flat():
    """E log|F| is (ln 2)/2 larger where F is complex than at frequency 0, where it is real."""
    delta = delta_of(noise(200, 64, 128), (8, 8))
    assert delta[1:].tolist() == pytest.approx([math.log(2) / 2] * 3, abs=0.03)


def test_a_grid_that_is_not_square_has_the_diagonal_of_the_frequency_plane():
    tokens = noise(2, 32, 3)
    spectrum = np.fft.fft2(tokens.view(2, 4, 8, 3).numpy(), axes=(1, 2))
    f = [np.log(np.abs(spectrum[:, i, 2 * i]) + 1e-6).mean() for i in range(2)]
    assert_close(delta_of(tokens, (4, 8)), [0, f[1] - f[0]], 1e-5)


# Whole models: every image weighs the same however the batches fall

@torch.inference_mode()
def test_batches_do_not_matter_where_they_should_not():
    model, images = tiny(), noise(7, 3, 32, 40)
    for measure in (lambda batches: fig3_fourier.amplitudes(model, batches, "with-positions", True),
                    lambda batches: fig5_attention.distance_and_entropy(model, batches, "pixels", False)):
        assert_close(measure(images.split([4, 3])), measure([images]), 1e-5)
        assert np.abs(measure([images[:4]]) - measure([images])).max() > 1e-4


@torch.inference_mode()
def test_amplitudes_and_distances_are_those_of_the_layers():
    """The numbers behind Figures 3 and 5 are the measures applied to the layers, computed block by block."""
    model, images = tiny(), noise(4, 3, 32, 40)
    ours = everything(model, images)
    plain = fig3_fourier.amplitudes(model, [images], "without-positions", False)
    assert plain.shape == (2, 4, 2)
    halves = fig3_fourier.amplitudes(model, [images], "with-positions", True)
    expected = [delta_of(ours[name][:, 1:], (4, 5)).numpy()
                for name in ("embedded", *(f"blocks.{i}{part}" for i in range(3) for part in (".attn", "")))]
    assert_close(halves[0], np.stack(expected), 1e-5)
    heads = fig5_attention.distance_and_entropy(model, [images], "authors", False)
    weights = attention.attention_weights(ours["blocks.1.logits"])
    distances = attention.patch_distances((4, 5), (14, 14))
    assert_close(heads[0, 1, :-1], attention.attention_distance(weights, distances).mean(dim=0), 1e-5)
    assert_close(heads[:, 0, -1], [distances.mean(), math.log(20)], 1e-6)


@torch.inference_mode()
def test_layer_similarity_takes_patch_tokens_of_norm1_and_the_final_norm():
    model, images = tiny(), noise(8, 3, 32, 40)
    (own,) = similarity.layer_grams(model, [images])
    ours = everything(model, images)
    layers = [ours[name][:, 1:] for name in ("blocks.0.norm1", "blocks.1.norm1", "blocks.2.norm1", "norm")]
    assert_close(own, grams(layers), 1e-6)
    by_pairs = [[hsic_by_definition(x, y) / math.sqrt(hsic_by_definition(x, x) * hsic_by_definition(y, y))
                 for y in layers] for x in layers]
    assert_close(cka.minibatch_cka([(own, own)]), by_pairs, 1e-4)


MEASURE_MEMORY = """
import torch
from common.vit import build_vit, eval_mode
from sec4_analysis import fig5_attention, similarity
model, images = eval_mode(build_vit("vit_tiny"), "cpu"), torch.randn(128, 3, 224, 224)
with torch.inference_mode():
    similarity.layer_grams(model, [images])
    fig5_attention.distance_and_entropy(model, [images], "pixels", False)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
def test_twelve_layers_fit_in_4_gib():
    """The whole process, for a batch of 128 at 224 px. Each further batch adds 1.7 MB, its centred matrices."""
    done = subprocess.run([sys.executable, "-c", MEASURE_MEMORY], check=True, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    gib = int(done.stdout) / 2**20
    print(f"peak {gib:.2f} GiB")
    assert 0.2 < gib < 4
