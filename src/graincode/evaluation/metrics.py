"""Metrics of sets of images, computed from their statistics. Each is a metric *in the features of a network*."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from graincode.core.errors import GraincodeError, check
from graincode.evaluation.estimate import Estimate, share_of
from graincode.evaluation.statistics import Statistics

CLASSIFIER_C = 0.01
"""Inverse strength of the L2 penalty of `class_consistency`: one value for every data set, never tuned."""

_DISTANCES = 20_000_000  # that are held at once


def frechet_distance(a: Statistics, b: Statistics) -> Estimate:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two sets in the features of one network, in float64.

    It is the FID only in Inception's features. It shrinks as images are added, so compare distances of equally many.
    Equal sets give 0 up to rounding, of either sign.
    Source: "GANs Trained by a Two Time-Scale Update Rule" (Heusel et al., 2017), by torch-fidelity's function.
    """
    _kept_of_both(a, b)
    return _frechet((a.mean, a.covariance), (b.mean, b.covariance), (a.count, b.count))


def spatial_distance(a: Statistics, b: Statistics) -> Estimate:
    """The Fréchet distance of two sets in the spatial features of one network, the sFID in Inception's.

    Source: "Generating Images with Sparse Representations" (Nash et al., 2021).
    """
    _kept_of_both(a, b)
    moments = [(one.spatial_mean, one.spatial_covariance) for one in (a, b)]
    if not len(a.spatial_mean) or a.spatial_mean.shape != b.spatial_mean.shape:
        found = " and ".join(str(len(mean)) for mean, _ in moments)
        raise GraincodeError(f"{found} spatial features: expected as many of both; gather them with spatial=True")
    return _frechet(*moments, (a.count, b.count))


def _frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], counts: tuple[int | None, int | None]) -> Estimate:
    """Of two means and covariances."""
    if 1 in counts:
        raise GraincodeError("Fréchet distance of 1 image: expected at least 2; give more images")
    both = [{"mu": mean.numpy(), "sigma": covariance.numpy()} for mean, covariance in (a, b)]
    return Estimate(fid_statistics_to_metric(*both, verbose=False)[KEY_METRIC_FID])


def inception_score(statistics: Statistics) -> Estimate:
    """exp E KL(p(y|x) || p(y)), mean and standard deviation over random parts of the images; in [1, classes].

    Images are divided at random: parts of samples that come sorted by class would score as if each were one class.
    Source: "Improved Techniques for Training GANs" (Salimans et al., 2016), equal to torch-fidelity's with its shuffle.
    """
    sizes = statistics.split_sizes.double()
    if not len(sizes):
        raise GraincodeError("statistics without class probabilities: gather them with splits=10")
    marginal = statistics.class_mass / sizes[:, None]
    scores = (statistics.class_entropy / sizes + torch.special.entr(marginal).sum(1)).exp().numpy()
    return Estimate(float(scores.mean()), float(scores.std()), f"standard deviation over {len(sizes)} splits")


def kernel_distance(
    generated: Statistics, real: Statistics, subsets: int = 100, size: int = 1000, seed: int = 0
) -> Estimate:
    """Squared maximum mean discrepancy with the kernel (x y / D + 1)^3, unbiased; the KID in Inception's features.

    Mean and standard deviation over random subsets of `size` kept images, drawn from the seed.
    Source: "Demystifying MMD GANs" (Binkowski et al., 2018), by torch-fidelity's function.
    """
    kept = _kept_of_both(generated, real)
    check("kid_subset_size", size, f"2 to {kept}, the number of images", 2 <= size <= kept)
    check("kid_subsets", subsets, "1 or more", subsets >= 1)
    how = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": seed % 2**32, "verbose": False}
    found = kid_features_to_metric(generated.subset, real.subset, **how)
    over = f"standard deviation over {subsets} subsets of {size} images"
    return Estimate(found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD], over)


def precision_recall(generated: Statistics, real: Statistics, neighbours: int = 3) -> dict[str, Estimate]:
    """`precision`: share of generated images that lie within reach of real ones; `recall`: the other way round.

    An image reaches as far as its k-th neighbour in its own set.
    Source: improved precision and recall (Kynkäänniemi et al., 2019), by torch-fidelity's function.
    """
    _check_neighbours(generated, real, neighbours)
    how = {"prc_neighborhood": neighbours, "save_cpu_ram": True, "verbose": False}
    how["prc_batch_size"] = _rows(generated, real)
    found = prc_features_to_metric(generated.subset, real.subset, **how)
    return {
        "precision": share_of(found[KEY_METRIC_PRECISION], len(generated.subset)),
        "recall": share_of(found[KEY_METRIC_RECALL], len(real.subset)),
    }


def density_coverage(generated: Statistics, real: Statistics, neighbours: int = 5) -> dict[str, Estimate]:
    """`density`: how many real images reach a generated one, over k; `coverage`: share of real images that reach one.

    Unlike precision and recall they are not ruled by outliers, whose reach is long. Density may exceed 1.
    Source: "Reliable Fidelity and Diversity Metrics for Generative Models" (Naeem et al., 2020), equations 3 and 4.
    """
    _check_neighbours(generated, real, neighbours)
    reaching, covered = 0, 0
    for block in real.subset.split(_rows(generated, real)):
        reach = torch.cdist(block, real.subset).kthvalue(neighbours + 1).values  # the first is the image itself
        within = torch.cdist(block, generated.subset) < reach[:, None]
        reaching += int(within.sum())
        covered += int(within.any(1).sum())
    density = reaching / (neighbours * len(generated.subset))
    return {"density": Estimate(density), "coverage": share_of(covered / len(real.subset), len(real.subset))}


def class_consistency(
    real: Statistics, real_labels: Tensor, test: Statistics, test_labels: Tensor,
    generated: Statistics, generated_labels: Tensor,
) -> dict[str, Estimate]:  # fmt: skip
    """Accuracy on generated images of a linear classifier that is trained on the real ones whose features were kept.

    Args:
        real, test: training images of at least two classes, and real images that are not among them, which judge.
        real_labels, test_labels, generated_labels: (N,) integers, of all images of a set; asked for, if generated.
    Returns:
        `class_accuracy` on generated images and `class_accuracy_of_real_images` on the test images, the yardstick, both
        in [0, 1]; `class_accuracy_ratio` of the two is above 1 where generated images are easier to tell apart.
    """
    sets = {"real": (real, real_labels), "test": (test, test_labels), "generated": (generated, generated_labels)}
    known = {}
    for name, (statistics, labels) in sets.items():
        _kept_of_both(real, statistics)
        if labels.shape != (statistics.count,):
            found = f"{name} labels of {tuple(labels.shape)}"
            raise GraincodeError(f"{found}: expected ({statistics.count},), one an image")
        known[name] = labels.cpu()[statistics.indices]
    if len(classes := known["real"].unique()) < 2:
        raise GraincodeError(f"real labels {classes.tolist()}: expected at least two classes")
    predict = _linear_classifier(real.subset, known["real"])
    of_test, of_generated = (
        share_of((predict(sets[name][0].subset) == known[name]).double().mean().item(), len(known[name]))
        for name in ("test", "generated")
    )
    if of_test.value == 0:
        raise GraincodeError(f"test accuracy 0 of a classifier of {len(classes)} classes: check the test labels")
    accuracies = {"class_accuracy": of_generated, "class_accuracy_of_real_images": of_test}
    return accuracies | {"class_accuracy_ratio": Estimate(of_generated.value / of_test.value)}


def _linear_classifier(features: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression on standardised features, in float64, fitted until the gradient is below 1e-5."""
    classes, targets = labels.unique(return_inverse=True)
    mean, std = features.double().mean(dim=0), features.double().std(dim=0, correction=0)
    scale = torch.where(std > 1e-10 * mean.abs(), std, 1.0)
    inputs = (features.double() - mean) / scale
    weight = torch.zeros(features.shape[1], len(classes), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(classes), dtype=torch.float64, requires_grad=True)
    how = {"max_iter": 1000, "tolerance_grad": 1e-5, "tolerance_change": 1e-13, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([weight, bias], **how)

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = weight.square().sum() / (2 * CLASSIFIER_C * len(inputs))
        value = F.cross_entropy(inputs @ weight + bias, targets) + penalty
        value.backward()
        return value

    optimizer.step(loss)
    return lambda points: classes[((points.double() - mean) / scale @ weight.detach() + bias.detach()).argmax(dim=1)]


def _kept_of_both(a: Statistics, b: Statistics) -> int:
    """Images whose features two sets of one network at least keep."""
    if (None not in (a.identity, b.identity) and a.identity != b.identity) or a.mean.shape != b.mean.shape:
        sizes = f"{len(a.mean)} features of {a.identity} and {len(b.mean)} of {b.identity}"
        raise GraincodeError(f"{sizes}: expected one network")
    return min(len(a.subset), len(b.subset))


def _rows(a: Statistics, b: Statistics) -> int:
    """Of a matrix of distances, how many are held at once."""
    return min(2000, max(1, _DISTANCES // max(len(a.subset), len(b.subset))))


def _check_neighbours(generated: Statistics, real: Statistics, neighbours: int) -> None:
    kept = _kept_of_both(generated, real)
    check("neighbours", neighbours, f"1 to {kept - 1}, below the number of images", 1 <= neighbours < kept)
