"""The commands of a recipe in order; what is done already is passed over."""
