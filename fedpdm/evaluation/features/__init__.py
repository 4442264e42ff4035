"""Maps from images to feature vectors, each under a name that every number made from it carries.

`InceptionFeatures` is FID's network, the only one whose Frechet distance is called FID;
`TrainedFeatures` is a small classifier that is trained here on images that no client holds;
`PixelExtractor` needs no network.
"""

from fedpdm.evaluation.features.extractor import FeatureExtractor, cache_directory
from fedpdm.evaluation.features.inception import InceptionFeatures
from fedpdm.evaluation.features.maps import MapFeatures
from fedpdm.evaluation.features.network import FitReport, SmallClassifier, fit_classifier, predict
from fedpdm.evaluation.features.pixel import PixelExtractor
from fedpdm.evaluation.features.reference import ReferenceFeatures, reference_features
from fedpdm.evaluation.features.trained import TrainedFeatures, train_feature_network

__all__ = [
    "FeatureExtractor",
    "FitReport",
    "InceptionFeatures",
    "MapFeatures",
    "PixelExtractor",
    "ReferenceFeatures",
    "SmallClassifier",
    "TrainedFeatures",
    "cache_directory",
    "fit_classifier",
    "predict",
    "reference_features",
    "train_feature_network",
]
