"""Parts of the kind 'scorers'."""
