"""Parts of the kind 'folds'."""
