"""``dattri new-plugin``: writes a distribution that works, for its author to change."""
