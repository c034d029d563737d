from .char_gpt import CharGPT as CharGPT
from .classifier import Classifier as Classifier
from .language_model import LanguageModel as LanguageModel
from .mlp import MLP as MLP
from .neural_sde_classifier import NeuralSDEClassifier as NeuralSDEClassifier
from .neural_sde_moments import NeuralSDEMoments as NeuralSDEMoments
from .resnet import ResNet as ResNet
