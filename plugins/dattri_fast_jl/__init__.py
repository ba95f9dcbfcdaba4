"""The projector of the package fast_jl, whose matrix depends on the GPU."""
