"""Representer point selection: a last layer as a sum over the train set."""
