"""Image-caption data sets: download, read, split, draw."""
