"""Curvatures of the train loss, each the mean over the train set."""
