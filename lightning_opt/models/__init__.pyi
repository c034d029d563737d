from .char_gpt import CharGPT as CharGPT
from .classifier import Classifier as Classifier
from .language_model import LanguageModel as LanguageModel
from .latent_ode import LatentODE as LatentODE
from .mlp import MLP as MLP
from .neural_ode_classifier import NeuralODEClassifier as NeuralODEClassifier
from .resnet import ResNet as ResNet
from .time_dependent_mlp import TimeDependentMLP as TimeDependentMLP
