"""GraSS: influence functions in sparse sketches: recipes."""
