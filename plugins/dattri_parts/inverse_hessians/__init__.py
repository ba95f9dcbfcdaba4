"""Parts of the kind 'inverse_hessians'."""
