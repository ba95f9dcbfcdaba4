"""What the generated pages of the documentation are made by; run by ``docs/generate.py``."""
