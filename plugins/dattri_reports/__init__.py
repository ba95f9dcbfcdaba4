"""Reports: what a run prints and draws."""
