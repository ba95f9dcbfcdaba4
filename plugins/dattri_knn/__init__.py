"""KNN-Shapley: exact values of train examples for nearest-neighbour predictors."""
