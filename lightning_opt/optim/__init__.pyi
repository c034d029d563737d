from .adabelief import AdaBelief as AdaBelief
