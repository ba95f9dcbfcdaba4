"""Settings: data, a model and how it is trained."""
