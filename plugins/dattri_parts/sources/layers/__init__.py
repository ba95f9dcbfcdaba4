"""Layer rules: the gradient of one kind of module, from its input and its output gradient."""
