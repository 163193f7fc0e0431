"""What a person sees: tables, bars, results in words."""
