from .calibrated_classifier import CalibratedClassifier as CalibratedClassifier
from .char_gpt import CharGPT as CharGPT
from .classifier import Classifier as Classifier
from .gymnasium_policy import GymnasiumPolicy as GymnasiumPolicy
from .language_model import LanguageModel as LanguageModel
from .mlp import MLP as MLP
from .resnet import ResNet as ResNet
