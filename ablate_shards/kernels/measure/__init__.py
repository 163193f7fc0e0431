"""Sums over the rows of a dump, and spectra of differences."""
