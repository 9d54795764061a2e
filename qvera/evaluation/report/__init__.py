"""HTML pages, one self-contained file each.

`read` reads a run directory. `run_page` and `pages` compute what a page shows. `charts` turns values into positions.
"""
