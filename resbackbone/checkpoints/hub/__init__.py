"""Published weights: the catalog of their names, and downloads."""
