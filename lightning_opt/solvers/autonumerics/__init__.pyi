from .front import Approximation as Approximation
from .front import ParetoFront as ParetoFront
from .problem import Problem as Problem
from .program import Program as Program
from .program import Step as Step
from .search import evolve as evolve
