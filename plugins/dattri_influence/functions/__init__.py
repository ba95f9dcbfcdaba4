"""Functions for developers of methods: products with Hessians and Fisher matrices and inverses."""
