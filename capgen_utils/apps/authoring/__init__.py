"""Tools for maintainers of the course: run notebooks, stamp cells, ship bundles."""
