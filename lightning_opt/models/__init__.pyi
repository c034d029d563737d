from .classifier import Classifier as Classifier
from .mlp import MLP as MLP
from .resnet import ResNet as ResNet
