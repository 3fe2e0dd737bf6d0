"""Figures of sets of images, computed from their features. Each is a figure *in the features of a network*."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

from graincode.core.errors import GraincodeError
from graincode.metrics.features import Features

CLASSIFIER_C = 0.01
"""Inverse strength of the L2 penalty of `class_consistency`: one value for every data set, never tuned."""


def frechet_distance(a: Features, b: Features) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), of means and covariances of features, in float64.

    It is the FID only in Inception's features; elsewhere it is named with its network. It shrinks as images are added,
    so compare figures of equally many. Equal sets give 0 up to rounding, of either sign.

    Args:
        a, b: at least 2 images each, in the features of one network; the order does not matter.
    Raises:
        GraincodeError: two networks, fewer than 2 images, or features that are not finite.
    Source: "GANs Trained by a Two Time-Scale Update Rule" (Heusel et al., 2017), by torch-fidelity's functions.
    """
    _check_comparable(a, b)
    for features in (a, b):
        if len(features) < 2:
            raise GraincodeError(f"Fréchet distance of {len(features)} image: expected at least 2; give more images")
    statistics = [fid_features_to_statistics(features.features.double()) for features in (a, b)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation of the score over the splits; the mean is in [1, number of classes]."""

    mean: float
    std: float


def inception_score(features: Features, splits: int = 10, seed: int = 0) -> InceptionScore:
    """exp E KL(p(y|x) || p(y)), on each of `splits` random parts of the images.

    Images are shuffled first: samples that come sorted by class would score as if each part were one class.

    Args:
        features: at least as many images as splits; the logits are used.
        splits: number of parts, 10 in published figures.
        seed: of the shuffle.
    Raises:
        GraincodeError: more splits than images, no split, or logits that are not finite.
    Source: "Improved Techniques for Training GANs" (Salimans et al., 2016), by torch-fidelity's function, in float64.
    """
    if not 1 <= splits <= len(features):
        raise GraincodeError(
            f"splits={splits}: expected 1 to {len(features)}, the number of images; type evaluation.inception_splits=1"
        )
    _check_finite(features.logits, "logits", features.identity)
    score = isc_features_to_metric(features.logits, splits, shuffle=True, rng_seed=seed)
    return InceptionScore(score[KEY_METRIC_ISC_MEAN], score[KEY_METRIC_ISC_STD])


@dataclass(frozen=True)
class ClassConsistency:
    """Whether generated images show the class that they were asked for.

    Attributes:
        real_accuracy: in (0, 1], of a classifier trained on real images, on other real images: the yardstick.
        accuracy: in [0, 1], of the same classifier on generated images and the classes asked for.
        ratio: accuracy / real_accuracy; above 1 where generated images are easier to tell apart than real ones.
    """

    real_accuracy: float
    accuracy: float
    ratio: float


def class_consistency(
    real: Features,
    real_labels: Tensor,
    test: Features,
    test_labels: Tensor,
    generated: Features,
    generated_labels: Tensor,
) -> ClassConsistency:
    """Accuracy on generated images of a linear classifier that is trained on real ones.

    The classifier is multinomial logistic regression on features standardised by the real set, with the fixed penalty
    `CLASSIFIER_C`. There are no random numbers in it.

    Args:
        real, real_labels: training images of at least two classes, and (N,) integers.
        test, test_labels: real images that are not among them; they judge the classifier and choose nothing.
        generated, generated_labels: and the classes that they were generated for.
    Raises:
        GraincodeError: several networks, labels that do not match the images, fewer than two classes, features that are
            not finite, or a classifier that gets no test image right.
    """
    sets = {"real": (real, real_labels), "test": (test, test_labels), "generated": (generated, generated_labels)}
    for name, (features, labels) in sets.items():
        _check_comparable(real, features)
        if labels.shape != (len(features),) or len(features) == 0:
            raise GraincodeError(
                f"{name} labels of shape {tuple(labels.shape)} for {len(features)} images: expected one label "
                "an image and at least one image; give the labels of these images"
            )
    classes = real_labels.unique()
    if len(classes) < 2:
        raise GraincodeError(f"real labels {classes.tolist()}: expected at least two classes; use labelled data")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=CLASSIFIER_C, max_iter=1000))
    classifier.fit(real.features.numpy(), real_labels.cpu().numpy())

    def accuracy_of(features: Features, labels: Tensor) -> float:
        return float(np.mean(classifier.predict(features.features.numpy()) == labels.cpu().numpy()))

    real_accuracy, accuracy = accuracy_of(test, test_labels), accuracy_of(generated, generated_labels)
    if real_accuracy == 0:
        raise GraincodeError(
            f"test accuracy 0 of a classifier of {len(classes)} classes: expected more; check that "
            "test labels are those of the test images"
        )
    return ClassConsistency(real_accuracy, accuracy, accuracy / real_accuracy)


def _check_comparable(a: Features, b: Features) -> None:
    if a.identity != b.identity:
        raise GraincodeError(
            f"features of {a.identity} and of {b.identity}: expected one network; extract both with it"
        )
    for features in (a, b):
        _check_finite(features.features, "features", features.identity)


def _check_finite(values: Tensor, what: str, identity: str) -> None:
    wrong = int((~values.isfinite()).any(dim=1).sum())
    if wrong:
        raise GraincodeError(
            f"{wrong} of {len(values)} images have NaN or infinite {what} in {identity}: expected finite "
            "ones; check the weights of the network"
        )
