"""TracIn and gradient products: recipes."""
