"""A direction removed from what some inputs become and not from what others do, as an adapter in closed form."""
