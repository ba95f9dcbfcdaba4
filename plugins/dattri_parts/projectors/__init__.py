"""Parts of the kind 'projectors'."""
