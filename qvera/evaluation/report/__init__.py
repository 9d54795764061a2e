"""The pages of qvera: one HTML file each, which loads nothing from anywhere.

`read` reads a run directory; `run_page` and `pages` compute what each page shows; `charts` turns values into positions;
the templates draw both.
"""
